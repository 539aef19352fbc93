"""A hierarchical VAE with two levels, x - z1 - z2, whose top level z2 collapses.

The mistake: the line for the KL of z2 is that of a well-known example, which sums over the batch.
All other terms of the loss are means over the batch. With batches of 100 images, the KL of z2 is
100 times too heavy: beta_2 = 100, whereas beta_1 = 1.

What happens: all 8 units of z2 collapse, while z1 describes the digits well. The post-mortem of z2
treats draws of z1 as the data of a VAE of their own. It names the objective as the cause, and the
beta below which a unit of z2 is of use. The program then trains two new models. The first one takes
the mean over the batch, so that beta_2 = 1. The second one keeps the mistake and trains three times
as long, which the post-mortem says would hardly help.

    python -m examples.hierarchy [folder of the data sets, by default "data"]

The losses that are compared are all the negative ELBO with beta_1 = beta_2 = 1: the binary
cross-entropy, summed over the pixels, plus the KLs of both levels, in nats per image. It is the
mean over the 20,000 training images, with one draw of z1 and z2 for each. The KLs and the units of
the table are those of z2. The loss of the longer training falls, too, because z1 improves.
"""
import sys

import torch
import torchvision
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from headroom import post_mortem

UNITS_1 = 32
UNITS_2 = 8
PIXELS = 784
BATCH_SIZE = 100


def perceptron(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, outputs))


class HVAE(nn.Module):
    """q(z1|x), q(z2|z1), p(z2), p(z1|z2), p(x|z1). p(z1|z2) has a learned std for each unit."""

    def __init__(self):
        super().__init__()
        self.encoder_1 = perceptron(PIXELS, 2 * UNITS_1)
        self.encoder_2 = perceptron(UNITS_1, 2 * UNITS_2)
        self.decoder_2 = perceptron(UNITS_2, UNITS_1)
        self.decoder_1 = perceptron(UNITS_1, PIXELS)
        self.log_std = nn.Parameter(torch.zeros(UNITS_1))

    def encode_1(self, x):
        mean, log_var = self.encoder_1(x).chunk(2, dim=1)
        return mean, log_var

    def encode_2(self, z1):
        mean, log_var = self.encoder_2(z1).chunk(2, dim=1)
        return mean, log_var


def draw(mean, log_var):
    return mean + (log_var / 2).exp() * torch.randn_like(mean)


def loss_terms(model, x):
    """-log p(x|z1) (B,), and the terms of KL 1 (B, UNITS_1) and KL 2 (B, UNITS_2), in nats."""
    mean_1, log_var_1 = model.encode_1(x)
    z1 = draw(mean_1, log_var_1)
    mean_2, log_var_2 = model.encode_2(z1)
    z2 = draw(mean_2, log_var_2)

    logits = model.decoder_1(z1)
    reconstruction = binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
    # E[log q(z1|x)] - log p(z1|z2). The constants of the two densities cancel.
    square = ((z1 - model.decoder_2(z2)) / model.log_std.exp()) ** 2
    kl_1 = 0.5 * (square - 1 - log_var_1) + model.log_std
    kl_2 = -0.5 * (1 + log_var_2 - mean_2**2 - log_var_2.exp())
    return reconstruction, kl_1, kl_2


def train(loader, num_epochs, sums_over_batch, device):
    """Train a new model. sums_over_batch is whether its loss has the mistake in KL 2."""
    torch.manual_seed(0)
    model = HVAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(num_epochs):
        for x in loader:
            reconstruction, kl_1, kl_2 = loss_terms(model, x.to(device))
            loss = reconstruction.mean() + kl_1.sum(1).mean()
            if sums_over_batch:
                loss = loss + kl_2.sum()
            else:
                loss = loss + kl_2.sum(1).mean()

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(model, loader, device):
    """Print and return the negative ELBO, the KL of z2 and the number of its active units.

    The first two are in nats per image. The ELBO has beta_1 = beta_2 = 1.
    """
    torch.manual_seed(0)
    count = loss = kl_1 = kl_2 = 0
    for x in loader:
        reconstruction, terms_1, terms_2 = loss_terms(model, x.to(device))
        loss += (reconstruction.sum() + terms_1.sum() + terms_2.sum()).item()
        kl_1 += terms_1.sum().item()
        kl_2 = kl_2 + terms_2.sum(0)
        count += len(x)
    kl_2 = kl_2 / count
    active = (kl_2 > 0.01).sum().item()
    print(
        f"The loss is {loss / count:.2f} nats, KL 1 is {kl_1 / count:.3f} nats, KL 2 is "
        f"{kl_2.sum():.3f} nats, and {active} of {UNITS_2} units of z2 are active.\n"
    )
    return loss / count, kl_2.sum().item(), active


@torch.no_grad()
def explain_level_2(model, loader, beta, device):
    """The post-mortem of z2. Its data are draws of z1, in standard deviations of p(z1|z2)."""
    torch.manual_seed(0)
    std = model.log_std.exp()
    draws = [draw(*model.encode_1(x.to(device))) / std for x in loader]

    def encode(scaled_z1):
        return model.encode_2(scaled_z1 * std)

    def decode(z2):
        return model.decoder_2(z2) / std

    return post_mortem(encode, decode, draws, beta=beta)


def main(folder="data", num_images=20_000, num_epochs=10):
    """Train, explain the collapse, and try a remedy and a control. Returns a row of the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torchvision.datasets.MNIST(folder, download=True).data[:num_images]
    images = (images.flatten(1) / 255 > 0.5).float()
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH_SIZE, shuffle=True)

    print(f"1. The model with the mistake sums KL 2 over the batch, so that beta_2 = {BATCH_SIZE}.")
    model = train(loader, num_epochs, sums_over_batch=True, device=device)
    loss_before, kl_before, active_before = evaluate(model, loader, device)

    print("2. The post-mortem of z2 says why. Its beta is beta_2 / beta_1.")
    result = explain_level_2(model, loader, beta=BATCH_SIZE, device=device)
    print(f"{result}\n")

    print("3. The remedy is a smaller beta_2. The mean over the batch has beta_2 = 1.")
    model = train(loader, num_epochs, sums_over_batch=False, device=device)
    loss_after, kl_after, active_after = evaluate(model, loader, device)

    print("4. The control keeps the mistake and trains three times as long.")
    model = train(loader, 3 * num_epochs, sums_over_batch=True, device=device)
    loss_control, _, active_control = evaluate(model, loader, device)

    return {
        "model": "z2 of a hierarchical VAE with two levels, binary MNIST",
        "script": "examples/hierarchy.py",
        "cause": result.cause,
        "verdict": f"{result.verdict}.",
        "remedy": "mean over the batch in place of the sum in the KL of z2",
        "loss_before": loss_before,
        "loss_after": loss_after,
        "kl_before": kl_before,
        "kl_after": kl_after,
        "active_before": str(active_before),
        "active_after": str(active_after),
        "units": str(UNITS_2),
        "control": "three times the epochs",
        "loss_control": loss_control,
        "active_control": str(active_control),
    }


if __name__ == "__main__":
    main(*sys.argv[1:2])
