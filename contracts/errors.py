"""Every error Salon raises on purpose, as one tree.

SalonError
├── ConfigError         a run that cannot work, found before the first image (names the field and the way out)
├── RegistryError       an unknown name, or a `module:Class` that does not load
├── PayloadError        bytes that break the wire format or a limit
├── LedgerError         a transition that the life of a group does not allow
│   └── StaleLease      the result of an expired or superseded attempt
├── StorageError        the run folder cannot be written any more (full, read-only); the run can be resumed
├── GuardStop           a guard ended the run; a checkpoint was written
├── VaultError          a vault that cannot do what was asked
│   ├── VaultFull       storing would exceed the vault's bound: wait until a state frees groups (back-pressure)
│   └── NotStored       bytes that the vault does not hold
├── ScoringError        a reward server that cannot be used at all (a failed *score* is an outcome, not an error)
├── VersionChanged      a scorer's version changed within the run, which is to stop then
├── WeightsError
│   ├── WeightsNotProven   an actor's live tensors differ from the published version
│   └── WeightsTimeout     weights did not reach a node in time
└── LearnerError
    ├── RankLost        a learner rank died or hangs; all ranks must be rebuilt
    │   └── OutOfMemory a rank had too little and left its peers waiting; rebuilt with half the micro-batch
    └── NonFiniteLoss   the loss or gradient is not finite

Does not own: exit codes' use (cluster/cli), HTTP status codes (reward_servers/app).
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a scheduler can act on."""

    FINISHED = 0
    FAILED = 1
    CONFIG = 2
    GUARD_STOP = 3
    STOPPED_RESUMABLE = 75  # EX_TEMPFAIL: run it again


class SalonError(Exception):
    """Root of all errors that are told to a user in one message, without a traceback."""

    exit_code = ExitCode.FAILED


class ConfigError(SalonError):
    """A configuration that cannot work.

    field: dotted path of the offending key(s); problem: what is wrong; way_out: what to write instead.
    """

    exit_code = ExitCode.CONFIG

    def __init__(self, field: str, problem: str, way_out: str = "") -> None:
        self.field, self.problem, self.way_out = field, problem, way_out
        super().__init__(f"{field}: {problem}" + (f" — {way_out}" if way_out else ""))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.field, self.problem, self.way_out)  # it crosses processes


class ConfigErrors(SalonError):
    """Several ConfigErrors at once, so that one validation shows every mismatch."""

    exit_code = ExitCode.CONFIG

    def __init__(self, errors: list[ConfigError]) -> None:
        self.errors = errors
        super().__init__("\n".join(str(error) for error in errors))

    def __reduce__(self) -> tuple[type, tuple[list[ConfigError]]]:
        return type(self), (self.errors,)


class RegistryError(SalonError):
    """An unknown entry, or a `module:Class` that cannot be imported."""

    exit_code = ExitCode.CONFIG


class PayloadError(SalonError):
    """Bytes that break the wire format or exceed a stated limit."""


class LedgerError(SalonError):
    """A transition that the life of a sample group does not allow."""


class StaleLease(LedgerError):
    """A result whose fencing token has expired or was superseded; it must be dropped, it is already accounted for."""


class StorageError(SalonError):
    """The run folder cannot be written any more. What was acknowledged is safe: make room, then resume."""

    @classmethod
    def of(cls, what: object, why: object) -> StorageError:
        """what: a file or folder, or words for it; why: what the system said."""
        return cls(
            f"{what} cannot be written: {why}. What was acknowledged is safe: make room, or make it writable, then "
            "resume the run"
        )


class GuardStop(SalonError):
    """Guards ended the run. A checkpoint was written, so it can be resumed, as it is or with other settings.

    The first line of the message is the run's outcome: `guard stop: ` with the guards and their reasons.
    """

    exit_code = ExitCode.GUARD_STOP


class VersionChanged(SalonError):
    """A scorer's version changed within the run and reward.on_version_change is `stop`. The run can be resumed."""

    exit_code = ExitCode.STOPPED_RESUMABLE


class VaultError(SalonError):
    """A vault cannot do what was asked."""


class VaultFull(VaultError):
    """Storing would exceed the vault's bound on disk; nothing was written. Wait until a saved state frees groups."""


class NotStored(VaultError):
    """The vault holds no bytes under that name: never written, deleted, or lost with a disk."""


class ScoringError(SalonError):
    """A reward server that cannot be used at all."""


class WeightsError(SalonError):
    """Weights did not arrive as published."""


class WeightsNotProven(WeightsError):
    """The digest or the canary of an actor's live tensors contradicts the published version."""


class WeightsTimeout(WeightsError):
    """Weights did not reach a node in time."""


class LearnerError(SalonError):
    """The learner cannot go on with this step."""


class RankLost(LearnerError):
    """A rank died or hangs: every rank must be rebuilt from the last state."""


class OutOfMemory(RankLost):
    """A rank ran out of memory where its peers wait for it: every rank must be rebuilt, with half the micro-batch."""


class NonFiniteLoss(LearnerError):
    """A loss or gradient norm is NaN or infinite."""
