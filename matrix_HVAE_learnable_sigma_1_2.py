"""Both encoder variances of a linear MHVAE learnable, which the paper leaves open: what becomes of z2?

    python matrix_HVAE_learnable_sigma_1_2.py --beta_2 0.5,1,2

Given the variance m of a mode of z1, all else at its best, the loss is (beta_2 - beta_1) log(m) / 2 + const for m above
b = beta_2 eta_dec^2 / beta_1, so that
    beta_2 > beta_1    every unit of z2 collapses, and z1 is the z of a VAE (theorem 1 with prior std eta_dec): VERIFIED
    beta_2 = beta_1    the same loss, but any m from b on is as good: the loss is VERIFIED, the units are not unique
    beta_2 < beta_1    the loss falls without bound as m grows: followed a while, then UNBOUNDED
A learnable encoder variance is what kills the top level. (Dang et al. 2024, arXiv 2306.05023, has Sigma1 fixed.)
"""
import math
from dataclasses import dataclass

import torch

import common
import theory


@dataclass
class Flags(common.MatrixFlags):
    beta_1: float = common.flag(1.0, "weight of KL(q(z1|x) || p(z1|z2))", above=0)
    beta_2: float = common.flag(2.0, "weight of KL(q(z2|z1) || p(z2))", above=0)
    eta_enc: float = common.flag(1.0, "std of the prior p(z2)", above=0)
    eta_dec: float = common.flag(1.0, "std of p(z1|z2) and of p(x|z1)", above=0)
    d_0: int = common.flag(6, "dimension of x", low=1)
    d_1: int = common.flag(5, "units of z1, and of z2", low=1)


class HVAE:
    """q(z1|x) = N(W1 x, diag sigma_1^2),  q(z2|z1) = N(W2 z1, diag sigma_2^2),  p(z2) = N(0, eta_enc^2 I),
    p(z1|z2) = N(U2 z2, eta_dec^2 I),  p(x|z1) = N(U1 z1, eta_dec^2 I)."""

    def __init__(self, f):
        self.f, random = f, common.generator(f.seed, "data")
        scales = torch.logspace(math.log10(4), math.log10(0.4), f.d_0, dtype=torch.float64)   # of theta, about
        mix = torch.linalg.qr(torch.randn(f.d_0, f.d_0, dtype=torch.float64, generator=random)).Q
        x = torch.randn(f.num_samples, f.d_0, dtype=torch.float64, generator=random) * scales @ mix
        self.A = theory.second_moment(x)                                     # E[x x^T]

    def start(self, draw):
        f = self.f
        return {"W1": draw(f.d_1, f.d_0), "W2": draw(f.d_1, f.d_1), "U2": draw(f.d_1, f.d_1), "U1": draw(f.d_0, f.d_1),
                "log_sigma_1": draw(f.d_1), "log_sigma_2": draw(f.d_1)}

    def z1_moment(self, p):
        return p["W1"] @ self.A @ p["W1"].T + torch.diag((2 * p["log_sigma_1"]).exp())

    def loss(self, p):
        """The expected negative beta-ELBO, exact, in nats: a 0-d tensor."""
        f, W1, W2, U2, U1 = self.f, p["W1"], p["W2"], p["U2"], p["U1"]
        sigma_1, sigma_2 = p["log_sigma_1"].exp(), p["log_sigma_2"].exp()
        identity = torch.eye(max(f.d_0, f.d_1), dtype=W1.dtype)
        unexplained = identity[:f.d_0, :f.d_0] - U1 @ W1                                         # E||x - U1 z1||^2:
        squared_error = (unexplained @ self.A * unexplained).sum() + (U1**2 @ sigma_1**2).sum()
        reconstruction = squared_error / (2 * f.eta_dec**2) + f.d_0 / 2 * math.log(2 * math.pi * f.eta_dec**2)
        z1_moment = self.z1_moment(p)
        unexplained = identity[:f.d_1, :f.d_1] - U2 @ W2                                         # E||z1 - U2 z2||^2:
        squared_error = (unexplained @ z1_moment * unexplained).sum() + (U2**2 @ sigma_2**2).sum()
        kl_1 = (squared_error / f.eta_dec**2 - f.d_1) / 2 - (sigma_1 / f.eta_dec).log().sum()
        z2_square = (W2 @ z1_moment * W2).sum(1) + sigma_2**2                                    # E[z2_i^2]
        kl_2 = ((z2_square / f.eta_enc**2 - 1) / 2 - (sigma_2 / f.eta_enc).log()).sum()
        return reconstruction + f.beta_1 * kl_1 + f.beta_2 * kl_2

    def predicted(self):
        f, theta = self.f, theory.spectrum(self.A).sqrt()
        of_z1 = theory.vae_optimum(theta, f.d_1, f.beta_1, f.eta_dec, f.eta_dec)
        if f.beta_2 == f.beta_1:
            return {"theta": of_z1["theta"], "loss": of_z1["loss"]}
        dead = torch.zeros(f.d_1, dtype=torch.float64)
        never = torch.where(of_z1["kl"] > 0, math.inf, 0)
        return {"theta": of_z1["theta"], "loss": of_z1["loss"], "collapse_1": never, "collapse_2": dead + f.beta_1,
                "lambda_2": dead, "omega_2": dead, "sigma_2": dead + f.eta_enc, "kl_2": dead, "information_2": dead} | {
            f"{name}_1": of_z1[name] for name in ("lambda", "omega", "sigma", "kl", "information")}

    def units(self, p):
        f = self.f
        z1 = theory.vae_units(p["U1"], p["W1"] @ theory.root(self.A), p["log_sigma_1"].exp(), f.eta_dec)
        z2 = theory.vae_units(
            p["U2"], p["W2"] @ torch.linalg.cholesky(self.z1_moment(p)), p["log_sigma_2"].exp(), f.eta_enc)
        return {f"{name}_1": values for name, values in z1.items()} | {f"{name}_2": values for name, values in z2.items()}


def climb_down(f):
    """Where beta_2 < beta_1: hold Sigma1 = sigma_1^2 I at larger and larger sigma_1, each time at theorem 3's optimum, an
    upper bound of the loss with Sigma1 learnable; then let go of it. Returns whether the loss fell as predicted."""
    device, hvae = common.device_of(f), HVAE(f)
    theta, starts = theory.spectrum(hvae.A).sqrt(), theory.random_starts(hvae, f, device)
    hvae = theory.moved(hvae, device)
    rows, errors, losses = [["sigma_1", "optimal loss", "found", "error"]], [], []
    for factor in (1, 2, 4):
        sigma_1 = factor * f.eta_dec
        held = {"log_sigma_1": torch.full((f.d_1,), math.log(sigma_1), dtype=torch.float64, device=device)}
        with device:
            found, loss = theory.minimise(lambda p: hvae.loss(p | held), [
                {name: value for name, value in start.items() if name not in held} for start in starts])[0]
        optimum = theory.hvae_optimum(theta, f.d_1, f.d_1, sigma_1, f.beta_1, f.beta_2, f.eta_enc, f.eta_dec)["loss"].item()
        rows.append([f"{sigma_1:g}", f"{optimum:.6f}", f"{loss:.6f}", f"{abs(loss - optimum):.1e}"])
        errors.append(abs(loss - optimum))
        losses.append(loss)
        scale = {"W1": 2.0, "U1": 1 / 2, "U2": 2.0, "W2": 1 / 2}             # the next one starts where this one ends
        starts = [{name: value * scale.get(name, 1) for name, value in found.items()}]
    with device:
        (_, released), *_ = theory.minimise(hvae.loss, [found | held], blocks=2)
    print(f"\nbeta_2 = {f.beta_2} < beta_1 = {f.beta_1}, seed {f.seed}: Sigma1 = sigma_1^2 I held (theorem 3). As sigma_1 "
          f"grows the loss falls by {(f.beta_1 - f.beta_2) * f.d_1:g} per unit of log sigma_1 in the end.")
    common.print_rows(rows)
    falls = all(after < before for before, after in zip(losses[1:], [*losses[2:], released]))
    verified = max(errors) <= 1e-3 and falls              # at a large sigma_1 the minimum is too narrow for more
    print(f"{'UNBOUNDED' if verified else 'FAILED'} max error {max(errors):.1e}; with Sigma1 let go the loss was "
          f"{released:.6f} when stopped")
    return verified


def main(argv=None):
    settings = common.parse_flags(Flags, argv)
    bounded = [f for f in settings if f.beta_2 >= f.beta_1]
    status = theory.verify(HVAE, bounded) if bounded else 0
    if any(f.beta_2 == f.beta_1 for f in bounded):
        print("where beta_2 = beta_1 the loss alone is compared: the optimum is flat, any m >= eta_dec^2 is as good")
    return max([status, *(int(not climb_down(f)) for f in settings if f.beta_2 < f.beta_1)])


if __name__ == "__main__":
    common.run(main)
