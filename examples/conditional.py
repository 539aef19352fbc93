"""A conditional VAE of a digit given its label, whose KL goes to 0.

The mistake: z is drawn with `Normal(mean, std).sample()`, which lets no gradient through. The
encoder then learns from the KL alone, and the KL is smallest where q(z|y, x) is the prior. With
`rsample()` the gradient of the reconstruction loss reaches the encoder, too.

What happens: all 16 units collapse, and the decoder draws the mean image of each label. The loss
itself is right, and beta is 1. The post-mortem names training as the cause, and how far the loss
would fall at least. It sees the trained model, not the training loop, and so cannot say which line
is wrong. As long as this line stays, a smaller initial standard deviation of q, a warm-up of beta,
more epochs, or another learning rate activates no unit.

The program then trains two new models. The first one draws z with `rsample()`. The second one keeps
the mistake and has a beta of 0.1. If training is the cause, a smaller beta should not help.

    python -m examples.conditional [folder of the data sets, by default "data"]

The losses that are compared are all the negative ELBO at beta = 1: the binary cross-entropy, summed
over the pixels, plus the KL, in nats per image. It is the mean over the 20,000 training images,
with one draw of z for each.
"""
import sys

import torch
import torchvision
from torch import nn
from torch.distributions import Normal
from torch.nn.functional import binary_cross_entropy, one_hot

from headroom import post_mortem

LATENT_UNITS = 16
PIXELS = 784
LABELS = 10


class CVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS + LABELS, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT_UNITS)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT_UNITS + LABELS, 256),
            nn.ReLU(),
            nn.Linear(256, PIXELS),
            nn.Sigmoid(),
        )

    def encode(self, y, x):
        """q(z|y, x) of images y and their labels x, as a Normal of the shape (batch, units)."""
        mean, log_var = self.encoder(torch.cat([y, x], dim=1)).chunk(2, dim=1)
        return Normal(mean, (log_var / 2).exp())

    def decode(self, z, x):
        return self.decoder(torch.cat([z, x], dim=1))


def kl_of_units(q):
    """The KL of each unit from N(0, 1), in nats, averaged over the batch: (units,)."""
    return torch.distributions.kl_divergence(q, Normal(0, 1)).mean(0)


def train(loader, num_epochs, has_gradient, beta, device):
    """Train a new model. has_gradient says whether the draws of z let the gradient through."""
    torch.manual_seed(0)
    model = CVAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(num_epochs):
        for y, x in loader:
            y, x = y.to(device), x.to(device)
            q = model.encode(y, x)
            z = q.rsample() if has_gradient else q.sample()
            reconstruction = binary_cross_entropy(model.decode(z, x), y, reduction="sum") / len(y)
            loss = reconstruction + beta * kl_of_units(q).sum()

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(model, loader, device):
    """Print and return the negative ELBO, the KL and the number of active units.

    The first two are in nats per image. The ELBO has beta = 1.
    """
    torch.manual_seed(0)
    count = reconstruction = kl = 0
    for y, x in loader:
        y, x = y.to(device), x.to(device)
        q = model.encode(y, x)
        p = model.decode(q.sample(), x)
        reconstruction += binary_cross_entropy(p, y, reduction="sum").item()
        kl = kl + kl_of_units(q) * len(y)
        count += len(y)
    kl = kl / count
    loss = reconstruction / count + kl.sum().item()
    active = (kl > 0.01).sum().item()
    print(
        f"The loss is {loss:.2f} nats, the KL is {kl.sum():.3f} nats, and {active} of "
        f"{LATENT_UNITS} units are active.\n"
    )
    return loss, kl.sum().item(), active


def main(folder="data", num_images=20_000, num_epochs=10):
    """Train, explain the collapse, and try a remedy and a control. Returns a row of the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mnist = torchvision.datasets.MNIST(folder, download=True)
    images = (mnist.data[:num_images].flatten(1) / 255 > 0.5).float()
    labels = one_hot(mnist.targets[:num_images], LABELS).float()
    pairs = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=128, shuffle=True)

    print("1. The model with the mistake draws z with sample().")
    model = train(loader, num_epochs, has_gradient=False, beta=1, device=device)
    loss_before, kl_before, active_before = evaluate(model, loader, device)

    print("2. The post-mortem says why.")
    result = post_mortem(
        model.encode,
        model.decode,
        loader,
        beta=1,
        likelihood="bernoulli",
        conditional=True,
        device=device,
    )
    print(f"{result}\n")

    print("3. The remedy is a change of training. It draws z with rsample().")
    model = train(loader, num_epochs, has_gradient=True, beta=1, device=device)
    loss_after, kl_after, active_after = evaluate(model, loader, device)

    print("4. The control keeps the mistake, and has beta = 0.1.")
    model = train(loader, num_epochs, has_gradient=False, beta=0.1, device=device)
    loss_control, _, active_control = evaluate(model, loader, device)

    return {
        "model": "CVAE of a digit given its label, binary MNIST",
        "script": "examples/conditional.py",
        "cause": result.cause,
        "verdict": f"{result.verdict}.",
        "remedy": "rsample() in place of sample()",
        "loss_before": loss_before,
        "loss_after": loss_after,
        "kl_before": kl_before,
        "kl_after": kl_after,
        "active_before": str(active_before),
        "active_after": str(active_after),
        "units": str(LATENT_UNITS),
        "control": "beta = 0.1 in place of 1",
        "loss_control": loss_control,
        "active_control": str(active_control),
    }


if __name__ == "__main__":
    main(*sys.argv[1:2])
