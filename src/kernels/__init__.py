"""Faster equals of the model's plain operations.

A gain stated in this package is the plain operation's time over the kernel's, for GPT-2 small, 2 windows of 256 tokens
and dropout 0.1. "AMD" is an EPYC with native bfloat16, two cores. "Intel" is a Xeon with AVX-512 but without native
bfloat16, one core, CPU time on a busy machine; there PyTorch's MKL leaves little to gain.
"""
