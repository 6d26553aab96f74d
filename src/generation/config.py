"""How the next token is chosen, how many tokens, samples and beams, and what ``python -m src.generate`` takes."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from src.config import Config, refuse

MOST_BEAMS = 256
Device = Literal["auto", "cpu", "cuda", "gpu", "mps"]


class Sampling(Config):
    """How one next token is chosen; see :func:`~src.generation.sampling.filter_logits`.

    ``temperature=0`` takes the likeliest token. ``top_k=None`` or 0, ``top_p=None`` or 1, ``min_p=None`` or 0 and
    ``repetition_penalty=1`` leave the distribution as it is.
    """

    temperature: float = Field(default=0.0, ge=0, examples=[1.0])
    top_k: int | None = Field(default=None, ge=0, examples=[25])
    top_p: float | None = Field(default=None, gt=0, le=1, examples=[0.9])
    min_p: float | None = Field(default=None, ge=0, le=1, examples=[0.05])
    repetition_penalty: float = Field(default=1.0, ge=1e-3, le=1e3)


class GenerationConfig(Sampling):
    """:class:`Sampling`, and how many tokens, samples and beams; the defaults are those of ``python -m src.generate``.

    ``num_beams`` above 1 searches instead of drawing and needs ``temperature=0``; it returns the ``num_samples`` best
    hypotheses by sum of log-probabilities / length ** ``length_penalty``. ``cuda_graph`` records the decoding step on a
    GPU.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_k: int | None = Field(default=25, ge=0)
    max_new_tokens: int = Field(default=50, ge=1)
    num_samples: int = Field(default=1, ge=1, le=10_000)
    num_beams: int = Field(default=1, ge=1, le=MOST_BEAMS)  # all are in memory at once; samples are drawn in batches
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    seed: int = Field(default=123, ge=0, lt=2**63)
    cuda_graph: bool = False

    @model_validator(mode="after")
    def _beams_search(self) -> "GenerationConfig":
        found = []
        if self.num_beams > 1 and self.temperature:
            found.append(
                f"num_beams={self.num_beams} searches and temperature={self.temperature} draws; use temperature=0 or "
                f"generation=beam, or num_beams=1"
            )
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            possible = self.num_samples <= MOST_BEAMS
            cure = f"num_beams={self.num_samples}" if possible else f"num_samples={self.num_beams}"
            found.append(f"num_samples={self.num_samples} is more than num_beams={self.num_beams} keep; use {cure}")
        refuse(found)
        return self


class GenerateConfig(GenerationConfig):
    """The keys of ``conf/generate.yaml``, which explains them; keys that a user adds are allowed. ``prompt``,
    ``prompt_file`` and ``stop`` may be given several times on a command line."""

    model_config = ConfigDict(extra="allow")

    weights: str = "gpt2"
    prompt: tuple[str, ...] | None = None
    prompt_file: tuple[str, ...] | None = None
    stop: tuple[str, ...] | None = None
    special_tokens: Literal["parse", "text"] = "parse"
    echo: bool = True
    inspect: bool = False
    device: Device = "auto"
    precision: Literal["32-true", "bf16-true"] = "32-true"

    @model_validator(mode="after")
    def _one_text_is_inspected(self) -> "GenerateConfig":
        if self.inspect and (self.num_beams > 1 or self.num_samples > 1):
            raise ValueError("inspect=true shows a single text; use num_samples=1 num_beams=1")
        return self
