"""The router's section of the configuration, and the whole configuration of a router process.

Frozen after load, unknown keys refused. Knows nothing of where the values come from (a YAML section or the
JSON file of one process) and reads no file.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SLOConfig(BaseModel):
    """Latency targets that live traffic is judged by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttft_ms: float = Field(default=1000.0, gt=0, allow_inf_nan=False)
    tpot_ms: float = Field(default=100.0, gt=0, allow_inf_nan=False)


class RouterConfig(BaseModel):
    """Everything an operator can set about the edge.

    `max_message_bytes` bounds one client message. A token id takes at most 3 bytes below 2^21, so 4 MiB
    carries prompts of over a million ids; text is bounded by `max_prompt_bytes` on top of that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    metrics_port: int = Field(default=0, ge=0, le=65535)
    policy: str = "least_loaded"
    reflection: bool = False
    slo: SLOConfig = SLOConfig()

    max_inflight_requests: int = Field(default=512, ge=1)
    max_queued_requests: int = Field(default=512, ge=0)
    default_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    max_timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    max_message_bytes: int = Field(default=4 << 20, ge=1 << 10)
    max_prompt_bytes: int = Field(default=1 << 20, ge=1)
    max_chat_messages: int = Field(default=1024, ge=1)
    max_stop_strings: int = Field(default=16, ge=0)
    max_stop_chars: int = Field(default=128, ge=1)
    max_stop_token_ids: int = Field(default=128, ge=0)
    max_logit_bias: int = Field(default=1024, ge=0)
    max_logprobs: int = Field(default=20, ge=0)

    max_buffered_tokens: int = Field(default=1024, ge=1)
    stall_timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    rpc_timeout_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    reconnect_s: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    max_reconnect_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    drain_grace_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> RouterConfig:
        if self.default_timeout_s > self.max_timeout_s:
            raise ValueError("default_timeout_s must not be above max_timeout_s")
        if self.reconnect_s > self.max_reconnect_s:
            raise ValueError("reconnect_s must not be above max_reconnect_s")
        return self


class RouterProcessConfig(BaseModel):
    """What one router process is started with. `served_model_name` empty means the directory's name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    controller_address: str
    model_dir: str
    served_model_name: str = ""
    router: RouterConfig = RouterConfig()
