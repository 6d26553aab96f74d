"""What Hugging Face's transformers computes, we compute."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers.generation import logits_process

from src.generation.config import Sampling
from src.generation.sampling import filter_logits

FILTERS = [
    (Sampling(0.7), [logits_process.TemperatureLogitsWarper(0.7)]),
    (Sampling(1.0, top_k=7), [logits_process.TopKLogitsWarper(7)]),
    (Sampling(1.0, top_p=0.6), [logits_process.TopPLogitsWarper(0.6)]),
    (Sampling(1.0, top_p=0.001), [logits_process.TopPLogitsWarper(0.001)]),
    (Sampling(1.0, min_p=0.08), [logits_process.MinPLogitsWarper(0.08)]),
    (Sampling(1.0, repetition_penalty=1.3), [logits_process.RepetitionPenaltyLogitsProcessor(1.3)]),
    (
        Sampling(1.4, top_k=25, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.2),
            logits_process.TemperatureLogitsWarper(1.4),
            logits_process.TopKLogitsWarper(25),
            logits_process.TopPLogitsWarper(0.9),
            logits_process.MinPLogitsWarper(0.02),
        ],
    ),
]


@pytest.mark.parametrize(("sampling", "processors"), FILTERS, ids=range(len(FILTERS)))
def test_same_filtered_distributions(sampling, processors):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 97, generator=generator)
    seen = torch.randint(97, (200, 30), generator=generator)
    expected = logits.clone()
    for processor in processors:
        expected = processor(seen, expected)
    found = filter_logits(logits, sampling, seen).softmax(-1)
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-6, rtol=0)
    assert torch.equal(found > 0, expected.softmax(-1) > 0)
