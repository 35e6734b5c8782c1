"""Finished models for people who know diffusers and not this project: `ARDPipeline`."""

from ard_jax.pipeline.pipeline import ARDPipeline, PipelineOutput

__all__ = ["ARDPipeline", "PipelineOutput"]
