"""All settings of Aither. Precedence: command line > environment > aither.yaml > these defaults.

Environment: `AITHER_` + section + `__` + key, e.g. `AITHER_FLUX__PORT=7401`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from aither_sdk.subjects import filter_fault

ENV_PREFIX = "AITHER_"
LOOPBACK_PREFIXES = ("127.", "localhost", "::1", "[::1]")
"""How an address begins that only this machine can reach."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Served(_Section):
    """A service with a data port. A port of 0 takes any free one; unset: from `port_base`."""

    bind: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. Loopback, because anything else needs `security.allow_plaintext`."""
    port: int | None = Field(None, ge=0, le=65535)
    """Data port. Unset: `port_base` + 1 (Flux), + 2 (Pulse), + 3 (Sense), + 80 (Constellation)."""
    health_port: int | None = Field(None, ge=0, le=65535)
    """Port on which the witness answers health. Unset: `port_base` + 101 .. 105."""


class QuotaSettings(_Section):
    """`flux.quotas:`, how much may be published and kept. A client is an event's `source`; nobody
    is authenticated, so this fences off accidents, not attackers."""

    events_per_s: float | None = Field(None, gt=0, le=1e9)
    """Events a second of one client in the long run. Unset: no limit."""
    bytes_per_s: float | None = Field(None, gt=0, le=1e12)
    """Encoded bytes a second of the same. Unset: no limit."""
    burst_s: float = Field(5.0, gt=0, le=86_400)
    """Seconds of its rate that a client which was silent may publish at once, and the longest wait
    of one batch. A batch that is larger never passes, so it must hold what the SDK sends: 512
    events and 1 MiB. The default is half of the SDK's patience for an answer."""
    clients: int = Field(10_000, ge=1, le=10_000_000)
    """Clients that are remembered, about 300 bytes each. The one that published least recently goes
    first; it begins anew with a full burst."""
    max_log_bytes: int | None = Field(None, ge=2**20)
    """When the log holds this much, publishing is refused (LOG_FULL) until something is removed:
    for those who would rather stop than lose old events. Unset: no limit."""

    @model_validator(mode="after")
    def _burst_holds_a_batch(self) -> QuotaSettings:
        for name, least in (("events_per_s", 512), ("bytes_per_s", 2**20)):
            rate = getattr(self, name)
            if rate is not None and rate * self.burst_s < least:
                raise ValueError(
                    f"{name} {rate:g} x burst_s {self.burst_s:g} is less than a batch of the SDK "
                    f"({least}), which would never pass; use burst_s: {math.ceil(least / rate)}"
                )
        return self


class RetentionRule(_Section):
    """One of `flux.retention.rules`: for the events of some subjects."""

    filter: str
    """Subjects that it is for, such as "pulse.>". For `max_events_per_subject` the first rule that
    matches a subject counts; the ages of all of them do."""
    max_age_s: float | None = Field(None, gt=0)
    """Events older than this are removed, the newest of a subject as well. Unset: no bound."""
    max_events_per_subject: int | None = Field(None, ge=1, le=1_000_000)
    """The newest so many events of each subject are kept; costs about 200 bytes of memory a subject
    and 40 an event that is kept. Unset: no bound."""

    @field_validator("filter")
    @classmethod
    def _is_a_filter(cls, value: str) -> str:
        if (fault := filter_fault(value)) is not None:
            raise ValueError(fault)
        return value


class RetentionSettings(_Section):
    """`flux.retention`: what leaves the log, and when. Unset: everything is kept, but events whose
    own time (`expire_time`) is over."""

    max_age_s: float | None = Field(None, gt=0)
    """Events older than this are removed. Unset: no bound."""
    max_bytes: int | None = Field(None, ge=2**20)
    """Bytes of encoded events held; the oldest go first. The file is about a third larger, and does
    not shrink: room that is free is used again. Unset: as large as the disk."""
    max_events: int | None = Field(None, ge=1)
    """Events held; the oldest go first. Unset: no bound."""
    keep_last_per_subject: bool = False
    """Whether these three bounds spare the newest event of each subject, its state, until another
    takes its place: then the log may stay above them. Costs about 200 bytes of memory a subject."""
    rules: list[RetentionRule] = []
    """For the events of some subjects, on top of the bounds of the whole log."""
    sweep_interval_s: float = Field(2.0, ge=0.1, le=3600)
    """How often it is looked for what must go; so much later than its time an event may leave."""


class FluxSettings(_Served):
    """`flux:`, the event bus."""

    address: str = ""
    """host:port at which clients dial Flux. Unset: 127.0.0.1 and Flux's port."""
    log: Literal["sqlite", "memory", "jetstream"] = "sqlite"
    """Where events are kept. sqlite: on disk, fsynced. memory: gone with the process. jetstream:
    in NATS, where several Flux nodes share them."""
    nats_url: str = "nats://127.0.0.1:4222"
    """Where NATS is, for the jetstream log; several servers of one cluster with commas between.
    A name and a password may stand in it: nats://name:password@host:4222."""
    nats_stream: str = Field("AITHER", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Stream that holds the events. Nodes with the same one are one bus. Made where it is missing;
    its name also stands before every subject."""
    nats_replicas: int = Field(1, ge=1, le=5)
    """Servers that keep each event, for a stream that Flux makes. 3 in a cluster survive the loss
    of one. A stream that is there already keeps what it has."""
    nats_duplicate_window_s: float = Field(120.0, ge=1.0, le=86_400.0)
    """For how long nats-server itself knows ids again, for a stream that Flux makes. Flux knows the
    newest 131,072 besides; this is for those that other nodes stored a moment ago, and it has to be
    longer than a node may be behind. Costs nats-server about 150 bytes an event of that time."""
    nats_credentials: Path | None = None
    """Credentials file (JWT and NKEY seed) for NATS. Unset: what `nats_url` says."""
    nats_synced: bool = False
    """Your word that every nats-server of this stream has `jetstream.sync_interval: always`, which
    a client cannot see. DURABILITY_FSYNC is refused without it. `aither up` sets it, for it writes
    that configuration."""
    max_hops: int = Field(8, ge=1, le=255)
    """Events deeper than this in a chain of causes are refused: it ends feedback loops."""
    ring_events: int = Field(65_536, ge=1, le=10_000_000)
    """Newest events held encoded in memory for live subscribers."""
    ring_bytes: int = Field(64 * 2**20, ge=2**20)
    """Bytes of the same; whichever bound is met first."""
    memory_log_events: int = Field(1_000_000, ge=1)
    """Events that the memory log keeps; the oldest go first."""
    memory_log_bytes: int = Field(256 * 2**20, ge=2**20)
    """Bytes of the same."""
    retention: RetentionSettings = RetentionSettings()
    """What leaves the log, and when. Unset: nothing but what expires."""
    max_subscriptions: int = Field(10_000, ge=1)
    """Streams of Subscribe at once; more are refused with RESOURCE_EXHAUSTED."""
    max_publish_streams: int = Field(4_096, ge=1)
    """Streams of PublishStream at once; more are refused with RESOURCE_EXHAUSTED. While the disk is
    slow each may hold one batch of up to 4 MiB beside the common 64 MiB."""
    quotas: QuotaSettings = QuotaSettings()
    """What one client may publish."""


class PulseSettings(_Served):
    """`pulse:`, the heartbeat."""

    fleet: Path | None = None
    """Fleet file. Unset: the default fleet, Aither's own services."""
    services: tuple[Literal["flux", "pulse", "genesis"], ...] = ("flux", "pulse", "genesis")
    """Those of Aither's own services that the default fleet holds, for where some do not run.
    `aither up --only` sets it."""
    max_checks: int = Field(32, ge=1, le=1024)
    """Checks at once; a check that finds no room in its period is skipped and counted."""


class SenseSettings(_Served):
    """`sense:`, the perception."""


class LlmSettings(_Section):
    """`genesis.llm:`, an OpenAI-compatible server. Without `base_url` no LLM is asked."""

    base_url: str | None = None
    """URL up to and including /v1. Unset: decisions are weighted choices."""
    model: str = ""
    """Model name as the server knows it."""
    api_key: SecretStr = SecretStr("")
    """Sent as a bearer token. Never logged."""


class GenesisSettings(_Section):
    """`genesis:`, the orchestrator. It has no data port."""

    bind: str = Field("127.0.0.1", min_length=1)
    """Address at which its witness answers health."""
    health_port: int | None = Field(None, ge=0, le=65535)
    """Port on which the witness answers health. Unset: `port_base` + 104."""
    agents: Path | None = None
    """Folder of agent files. Unset: the shipped agents."""
    routines: Path | None = None
    """File of routines. Unset: the shipped one."""
    neurons: Path | None = None
    """File of neurons. Unset: the shipped one."""
    tick_s: float = Field(5.0, ge=0.05, le=3600)
    """Seconds from one tick to the next."""
    seed: int | None = None
    """Seed of weighted choices. Unset: from the system, other at every start."""
    llm: LlmSettings = LlmSettings()
    """The language model."""


class ConstellationSettings(_Served):
    """`constellation:`, the dashboard (HTTP)."""


class TelemetrySettings(_Section):
    """`telemetry:`. Where to send is said by the standard OTEL_* variables; unset: nowhere."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line that is written."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON lines elsewhere."""
    stall_ms: int = Field(100, ge=20, le=60_000)
    """The event loop stands still when its beat is late by this many milliseconds."""
    stall_error_ms: int = Field(500, ge=20, le=600_000)
    """From this many on a stall is an error, before it is a warning."""
    stalls_per_minute: float = Field(20, gt=0, le=6_000)
    """Stalls told one by one; more are counted, and the next one that is told says how many. Those
    of 5 s and more are always told."""
    user_code: tuple[str, ...] = ()
    """Folders whose code is yours, so that a stall is laid at its lines, though it lies among the
    installed packages. Unset: what is not installed, and the service's own package."""


class SecuritySettings(_Section):
    """`security:`."""

    allow_plaintext: bool = False
    """Permit binding to other than loopback addresses without TLS, e.g. inside a cluster whose
    network is trusted."""


class Settings(BaseSettings):
    """Everything, frozen. Made by `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    port_base: int = Field(7400, ge=0, le=65000)
    """All ports follow from it; see `_Served`. 0: every port is any free one."""
    data_dir: Path = Path(".aither")
    """Folder of everything that is kept: the log, child logs, state."""
    drain_timeout_s: float = Field(4.0, gt=0, le=600)
    """Longest time from SIGTERM to the end of the process."""
    flux: FluxSettings = FluxSettings()
    sense: SenseSettings = SenseSettings()
    pulse: PulseSettings = PulseSettings()
    genesis: GenesisSettings = GenesisSettings()
    constellation: ConstellationSettings = ConstellationSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    security: SecuritySettings = SecuritySettings()

    @field_validator("data_dir", mode="before")
    @classmethod
    def _is_named(cls, given: Any) -> Any:
        """An empty path would be the folder that one happens to stand in."""
        if isinstance(given, str) and not given.strip():
            raise ValueError("empty; name a folder, such as .aither")
        return given

    @model_validator(mode="before")
    @classmethod
    def _fill_ports(cls, given: Any) -> Any:
        """Ports that nobody set follow `port_base`."""
        try:
            base = int(given.get("port_base", cls.model_fields["port_base"].default))
        except (TypeError, ValueError):
            return given
        filled = dict(given)
        for section, offset, health_offset in _PORTS:
            values = filled.get(section, {})
            if not isinstance(values, Mapping):
                continue
            values = dict(values)
            if offset is not None and values.get("port") is None:
                values["port"] = base + offset if base else 0
            if values.get("health_port") is None:
                values["health_port"] = base + health_offset if base else 0
            if section == "flux" and not values.get("address"):
                values["address"] = f"127.0.0.1:{values['port']}"
            filled[section] = values
        return filled


_PORTS: tuple[tuple[str, int | None, int], ...] = (
    ("flux", 1, 101),
    ("pulse", 2, 102),
    ("sense", 3, 103),
    ("genesis", None, 104),
    ("constellation", 80, 105),
)
