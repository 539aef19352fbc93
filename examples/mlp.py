"""A VAE of two small perceptrons on grey digits, whose KL goes to 0.

The mistake: `binary_cross_entropy` averages over the 784 pixels by default, and the KL is added to
this mean. Relative to the sum over the pixels, the KL is then 784 times too heavy: beta = 784.

What happens: all 16 units collapse, and every reconstruction is the mean image. The post-mortem
names the objective as the cause, and the beta below which a unit is of use. For this it must be
given the beta that the loss really has. With `beta=1`, as the loss seems to have, it would name
training. The program then trains two new models. The first one sums over the pixels, so that
beta = 1. The second one keeps the mistake and trains three times as long, which the post-mortem
says would hardly help.

    python -m examples.mlp [folder of the data sets, by default "data"]

The losses that are compared are all the negative ELBO at beta = 1: the binary cross-entropy, summed
over the pixels, plus the KL, in nats per image. It is the mean over the 20,000 training images,
with one draw of z for each.
"""
import sys

import torch
import torchvision
from torch import nn
from torch.nn.functional import binary_cross_entropy

from headroom import post_mortem

LATENT_UNITS = 16
PIXELS = 784


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT_UNITS)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT_UNITS, 256), nn.ReLU(), nn.Linear(256, PIXELS), nn.Sigmoid()
        )

    def encode(self, x):
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return mean, log_var

    def decode(self, z):
        return self.decoder(z)


def kl_of_units(mean, log_var):
    """The KL of each unit from N(0, 1), in nats, averaged over the batch: (units,)."""
    return -0.5 * (1 + log_var - mean**2 - log_var.exp()).mean(0)


def train(loader, num_epochs, reduction, device):
    """Train a new model. reduction says whether the reconstruction loss is a mean or a sum."""
    torch.manual_seed(0)
    model = VAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(num_epochs):
        for x in loader:
            x = x.to(device)
            mean, log_var = model.encode(x)
            z = mean + (log_var / 2).exp() * torch.randn_like(mean)
            reconstruction = binary_cross_entropy(model.decode(z), x, reduction=reduction)
            if reduction == "sum":
                reconstruction = reconstruction / len(x)
            loss = reconstruction + kl_of_units(mean, log_var).sum()

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
    for x in loader:
        x = x.to(device)
        mean, log_var = model.encode(x)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        reconstruction += binary_cross_entropy(model.decode(z), x, reduction="sum").item()
        kl = kl + kl_of_units(mean, log_var) * len(x)
        count += len(x)
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
    images = torchvision.datasets.MNIST(folder, download=True).data[:num_images]
    images = images.flatten(1) / 255
    loader = torch.utils.data.DataLoader(images, batch_size=128, shuffle=True)

    print("1. The model with the mistake averages over the pixels, so that beta = 784.")
    model = train(loader, num_epochs, reduction="mean", device=device)
    loss_before, kl_before, active_before = evaluate(model, loader, device)

    print("2. The post-mortem says why.")
    result = post_mortem(
        model.encode,
        model.decode,
        loader,
        beta=PIXELS,
        likelihood="bernoulli",
        device=device,
    )
    print(f"{result}\n")

    print("3. The remedy is a smaller beta. The sum over the pixels has beta = 1.")
    model = train(loader, num_epochs, reduction="sum", device=device)
    loss_after, kl_after, active_after = evaluate(model, loader, device)

    print("4. The control keeps the mistake and trains three times as long.")
    model = train(loader, 3 * num_epochs, reduction="mean", device=device)
    loss_control, _, active_control = evaluate(model, loader, device)

    return {
        "model": "VAE of perceptrons, grey MNIST",
        "script": "examples/mlp.py",
        "cause": result.cause,
        "verdict": f"{result.verdict}.",
        "remedy": "sum over the pixels in place of their mean",
        "loss_before": loss_before,
        "loss_after": loss_after,
        "kl_before": kl_before,
        "kl_after": kl_after,
        "active_before": str(active_before),
        "active_after": str(active_after),
        "units": str(LATENT_UNITS),
        "control": "three times the epochs",
        "loss_control": loss_control,
        "active_control": str(active_control),
    }


if __name__ == "__main__":
    main(*sys.argv[1:2])
