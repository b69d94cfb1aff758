"""The engine's section of the configuration: what a user may choose, validated once, frozen afterwards.

Names follow vLLM. Knows nothing of the model: limits that depend on it are checked when both are known.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIB = 1 << 20


class EngineConfig(BaseModel):
    """How one engine runs a model.

    `dtype="auto"` is float32 on a CPU and the checkpoint's own on a GPU. KV is kept in the same dtype, or, rounded and
    in up to a quarter of the memory, in int8. Without `num_blocks` the pool takes
    `kv_cache_memory_bytes` on a CPU, and on a GPU what the weights leave of `gpu_memory_utilization` of the device.
    `max_model_len=None` is the model's own limit, or what the pool holds if that is less. `pack_weights` lets oneDNN
    keep the weights of linear layers in a second layout (float32 on a CPU): faster steps for twice the memory.
    `prefix_caching` keeps the KV of full blocks until the memory is needed, for prompts that begin alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    block_size: int = Field(default=16, ge=1, le=1024)
    num_blocks: int | None = Field(default=None, ge=1)
    kv_cache_memory_bytes: int = Field(default=256 * MIB, gt=0)
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    max_model_len: int | None = Field(default=None, ge=2)
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=512, ge=1)
    num_threads: int | None = Field(default=None, ge=1)
    pack_weights: bool = True
    prefix_caching: bool = True

    @model_validator(mode="after")
    def _every_sequence_fits_a_step(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence computes a token in each step"
            )
        return self
