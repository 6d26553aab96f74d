"""How to choose the next token, how many of them, and what makes that impossible."""

from dataclasses import dataclass

DEVICES = ("auto", "cpu", "cuda", "gpu", "mps")
MOST_SAMPLES, MOST_BEAMS = 10_000, 256  # samples are drawn some at a time, beams are all held in memory


@dataclass(frozen=True)
class Sampling:
    """How one next token is chosen; see :func:`~src.generation.sampling.filter_logits`.

    ``temperature=0`` takes the likeliest. ``top_k=None`` or 0, ``top_p=None`` or 1, ``min_p=None`` or 0 and
    ``repetition_penalty=1`` leave the distribution as it is. A temperature that is a tensor ``(B, 1)`` gives each
    row its own.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if found := self.problems():
            raise ValueError("\n".join(found))

    def problems(self) -> list[str]:
        """Every setting that no token can be chosen by, one line each, with one that can."""
        coldest = self.temperature if isinstance(self.temperature, int | float) else self.temperature.min().item()
        found = []
        if not 0 <= coldest < float("inf"):
            found.append(f"temperature={coldest} cannot be negative or infinite: temperature=1.0")
        if (self.top_k or 0) < 0:
            found.append(f"top_k={self.top_k} cannot be negative: top_k=25, or top_k=null for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must lie above 0 and up to 1: top_p=0.9, or top_p=null for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            found.append(f"min_p={self.min_p} must lie between 0 and 1: min_p=0.05, or min_p=null for all tokens")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            found.append(
                f"repetition_penalty={self.repetition_penalty} must lie between 0.001 and 1000: repetition_penalty=1.0"
            )
        return found


@dataclass(frozen=True)
class GenerationConfig(Sampling):
    """:class:`Sampling`, and how many tokens, samples and beams; the defaults are those of ``python -m src.generate``.

    ``num_beams`` above 1 searches instead of drawing, with ``temperature=0``, and then ``num_samples`` are the best
    hypotheses by sum of log-probabilities / length ** ``length_penalty``. ``cuda_graph`` records the step of decoding
    on a GPU."""

    temperature: float = 1.0
    top_k: int | None = 25
    max_new_tokens: int = 50
    num_samples: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 123
    cuda_graph: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} must be at least 1: max_new_tokens=50")
        for key, most in ("num_samples", MOST_SAMPLES), ("num_beams", MOST_BEAMS):
            value = getattr(self, key)
            if not 1 <= value <= most:
                found.append(f"{key}={value} must lie between 1 and {most:,}: {key}={min(max(value, 1), most)}")
        if not -100 <= self.length_penalty <= 100:
            found.append(f"length_penalty={self.length_penalty} must lie between -100 and 100: length_penalty=1.0")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} must be at least 0 and below 2**63: seed=1")
        if self.num_beams > 1 and self.temperature:
            found.append(
                f"num_beams={self.num_beams} searches, temperature={self.temperature} draws: temperature=0 or "
                f"generation=beam, or num_beams=1"
            )
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            found.append(
                f"num_samples={self.num_samples} is more than num_beams={self.num_beams} can keep: "
                f"num_beams={self.num_samples}"
            )
        return found
