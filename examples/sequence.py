"""A VAE of sentences with an autoregressive decoder, whose KL goes to 0.

The mistake: `cross_entropy` averages over the 10 words of a sentence by default, and the KL is
added to this mean. Relative to the sum over the words, the KL is then 10 times too heavy:
beta = 10.

The sentences: each has one of 6 hidden topics, which z could describe. Each word depends on the
topic and on the word before it. The language is drawn here, so that its exact mean of -log p(x) is
known.

What happens: all 8 units collapse. The decoder reads the previous words, infers the topic from
them, and needs no z. The post-mortem names the objective as the cause. On held-out rows rho_1 is
just above 1. So the sum over the words alone, which has beta = 1, would hardly be enough. The
program then trains three new models:

- The remedy has beta = 0.5, which is far below rho_1.
- The control keeps the mistake and trains three times as long.
- A last model has beta = 1. Its KL is small, and its loss is about that of the collapsed model.

    python -m examples.sequence

The losses that are compared are all the cross-entropy, summed over the words, plus 0.5 KL, in nats
per sentence. It is the mean over the 20,000 training sentences, with one draw of z for each. A
collapsed model has the same loss for any beta. The program also prints the negative ELBO, which
has beta = 1. The remedy raises it, because this decoder describes the sentences as well without z.
"""
import sys

import torch
from torch import nn
from torch.distributions import Dirichlet
from torch.nn.functional import cross_entropy

from headroom import post_mortem

WORDS = 12
LENGTH = 10
TOPICS = 6
LATENT_UNITS = 8
HIDDEN_UNITS = 64

# The code in front of each sentence.
START = WORDS

# The beta of the remedy, with which all losses are compared.
SMALL_BETA = 0.5


def draw_language(num_sentences):
    """Sentences (num_sentences, LENGTH), and the exact mean of their -log p(x) in nats."""
    torch.manual_seed(0)
    few_words = torch.full((WORDS,), 0.3)
    followers = Dirichlet(few_words).sample((WORDS,))
    words_of_topics = Dirichlet(few_words).sample((TOPICS,))

    # 1. The sentences. Half of the words follow from the topic, and half from the previous word.
    topics = torch.randint(TOPICS, (num_sentences,))
    p = words_of_topics[topics]
    sentences = []
    for _ in range(LENGTH):
        words = torch.multinomial(p, 1)[:, 0]
        sentences.append(words)
        p = (followers[words] + words_of_topics[topics]) / 2
    sentences = torch.stack(sentences, dim=1)

    # 2. Their probability is a mean over the topics.
    log_p = []
    for words_of_topic in words_of_topics:
        total = words_of_topic[sentences[:, 0]].log()
        for previous, word in zip(sentences.T[:-1], sentences.T[1:]):
            total = total + ((followers[previous, word] + words_of_topic[word]) / 2).log()
        log_p.append(total)
    log_px = torch.stack(log_p).logsumexp(0) - torch.tensor(float(TOPICS)).log()
    return sentences, -log_px.mean().item()


class VAE(nn.Module):
    """The encoder reads a sentence. The decoder reads z and the words before each word."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS + 1, 16)
        self.encoder = nn.GRU(16, HIDDEN_UNITS, batch_first=True)
        self.to_posterior = nn.Linear(HIDDEN_UNITS, 2 * LATENT_UNITS)
        self.to_hidden = nn.Linear(LATENT_UNITS, HIDDEN_UNITS)
        self.decoder = nn.GRU(16 + LATENT_UNITS, HIDDEN_UNITS, batch_first=True)
        self.to_logits = nn.Linear(HIDDEN_UNITS, WORDS)

    def encode(self, sentences, previous):
        """q(z|x) of sentences (B, LENGTH). The words before each word say nothing new."""
        _, hidden = self.encoder(self.embedding(sentences))
        mean, log_var = self.to_posterior(hidden[0]).chunk(2, dim=1)
        return mean, log_var

    def logits(self, z, previous):
        """The logits (B, LENGTH, WORDS) of each word."""
        z_of_words = z[:, None].expand(-1, previous.shape[1], -1)
        inputs = torch.cat([self.embedding(previous), z_of_words], dim=2)
        hidden, _ = self.decoder(inputs, self.to_hidden(z).tanh()[None])
        return self.to_logits(hidden)

    def decode(self, z, previous):
        return self.logits(z, previous).softmax(dim=-1)


def kl_of_units(mean, log_var):
    """The KL of each unit from N(0, 1), in nats, averaged over the batch: (units,)."""
    return -0.5 * (1 + log_var - mean**2 - log_var.exp()).mean(0)


def train(loader, num_epochs, reduction, kl_weight, device):
    """Train a new model. reduction says whether the cross-entropy is a mean or a sum over words."""
    torch.manual_seed(0)
    model = VAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(num_epochs):
        for x, previous in loader:
            x, previous = x.to(device), previous.to(device)
            mean, log_var = model.encode(x, previous)
            z = mean + (log_var / 2).exp() * torch.randn_like(mean)
            logits = model.logits(z, previous).transpose(1, 2)
            reconstruction = cross_entropy(logits, x, reduction=reduction)
            if reduction == "sum":
                reconstruction = reconstruction / len(x)
            loss = reconstruction + kl_weight * kl_of_units(mean, log_var).sum()

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(model, loader, device):
    """Print and return the loss at SMALL_BETA, the KL and the number of active units.

    The first two are in nats per sentence.
    """
    torch.manual_seed(0)
    count = reconstruction = kl = 0
    for x, previous in loader:
        x, previous = x.to(device), previous.to(device)
        mean, log_var = model.encode(x, previous)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        logits = model.logits(z, previous).transpose(1, 2)
        reconstruction += cross_entropy(logits, x, reduction="sum").item()
        kl = kl + kl_of_units(mean, log_var) * len(x)
        count += len(x)
    reconstruction = reconstruction / count
    kl = kl / count
    total_kl = kl.sum().item()
    loss = reconstruction + SMALL_BETA * total_kl
    active = (kl > 0.01).sum().item()
    print(
        f"The loss is {loss:.2f} nats, the negative ELBO {reconstruction + total_kl:.2f} nats and "
        f"the KL {total_kl:.3f} nats. {active} of {LATENT_UNITS} units are active.\n"
    )
    return loss, total_kl, active


def main(folder="data", num_sentences=20_000, num_epochs=10):
    """Train, explain the collapse, and try a remedy and a control. Returns a row of the table.

    The folder of the data sets is an argument of all examples. This one needs none.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sentences, exact = draw_language(num_sentences)
    starts = torch.full((num_sentences, 1), START)
    previous = torch.cat([starts, sentences[:, :-1]], dim=1)
    pairs = torch.utils.data.TensorDataset(sentences, previous)
    loader = torch.utils.data.DataLoader(pairs, batch_size=128, shuffle=True)
    print(f"The language itself has a mean -log p(x) of {exact:.2f} nats per sentence.\n")

    print(f"1. The model with the mistake averages over the words, so that beta = {LENGTH}.")
    model = train(loader, num_epochs, reduction="mean", kl_weight=1, device=device)
    loss_before, kl_before, active_before = evaluate(model, loader, device)

    print("2. The post-mortem says why.")
    result = post_mortem(
        model.encode,
        model.decode,
        loader,
        beta=LENGTH,
        likelihood="categorical",
        conditional=True,
        device=device,
    )
    print(f"{result}\n")

    print(f"3. The remedy is a beta below rho_1: a sum over the words, and beta = {SMALL_BETA}.")
    model = train(loader, num_epochs, reduction="sum", kl_weight=SMALL_BETA, device=device)
    loss_after, kl_after, active_after = evaluate(model, loader, device)

    print("4. The control keeps the mistake and trains three times as long.")
    model = train(loader, 3 * num_epochs, reduction="mean", kl_weight=1, device=device)
    loss_control, _, active_control = evaluate(model, loader, device)

    print("5. The sum over the words alone, with beta = 1, is hardly better than the mistake.")
    model = train(loader, num_epochs, reduction="sum", kl_weight=1, device=device)
    evaluate(model, loader, device)

    return {
        "model": "VAE of sentences, autoregressive decoder, synthetic language",
        "script": "examples/sequence.py",
        "cause": result.cause,
        "verdict": f"{result.verdict}.",
        "remedy": f"sum over the words in place of their mean, and beta = {SMALL_BETA}",
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
