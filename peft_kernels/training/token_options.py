"""`--token-elimination` and the options beside it: a ratio and how tokens are chosen, or a directory that says both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .. import ops
from ..config.token_elimination import TokenEliminationConfig
from .errors import UserError

if TYPE_CHECKING:
    from .settings import Settings

SCORES = ("attention", "norm", "random")
"""What a run can choose tokens by: the others need something before each step, or beside the model."""

_OF_BOTH = ("token_score", "token_layers")
_OF_ELIMINATION = ("token_block_size", "token_select_every")


def ratio_or_directory(text: str) -> float | str:
    """The value of `--token-elimination`: a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def check(settings: Settings) -> None:
    """Raises UserError for options that do not go together, and for a directory that cannot be used."""
    asked, tuned = settings.token_elimination, settings.token_tune
    if asked is not None and tuned is not None:
        raise UserError("--token-elimination and --token-tune say both what becomes of a token; give one of them")
    by_name = _OF_ELIMINATION if tuned is not None else (*_OF_BOTH, *_OF_ELIMINATION)
    named = _given(settings, by_name)
    if asked is None:
        for name in (*named, *_given(settings, ("token_loss", "token_keep_steps"))):
            by = "--token-elimination or --token-tune" if name in _OF_BOTH else "--token-elimination"
            raise UserError(f"{_option(name)} needs {by}, which says how much is kept")
    elif isinstance(asked, str):
        if named:
            raise UserError(f"{_option(named[0])} is said by the directory of --token-elimination; leave it out")
        if settings.token_keep_steps is not None:
            raise UserError(
                f"--token-keep-steps needs a ratio to begin with as --token-elimination, got the directory {asked}"
            )
        _check_directory(asked, _loaded(asked), settings.seq_len)
    for name, share in (("token_elimination", asked), ("token_tune", tuned)):
        if isinstance(share, float | int) and not 0.0 < share <= 1.0:
            raise UserError(f"{_option(name)} must be in (0, 1], got {share}")
    settings.token_layer_indices()
    if isinstance(asked, float | int):
        _check_kept_tokens(asked, settings)
    if tuned is not None and tuned < 1.0 and ops.kept_tokens(settings.seq_len, tuned, 1) == settings.seq_len:
        raise UserError(f"--token-tune {tuned} of --seq-len {settings.seq_len}, rounded up, is all of it")


def _given(settings: Settings, names: Iterable[str]) -> list[str]:
    """Those options that differ from their defaults."""
    return [name for name in names if getattr(settings, name) != getattr(type(settings), name)]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_kept_tokens(keep: float, settings: Settings) -> None:
    kept = ops.kept_tokens(settings.seq_len, keep, settings.token_block_size)
    if keep < 1.0 and kept == settings.seq_len:
        raise UserError(
            f"--token-elimination {keep} of --seq-len {settings.seq_len} in blocks of --token-block-size "
            f"{settings.token_block_size}, rounded up, is all of it; take smaller blocks or longer sequences"
        )


def _loaded(directory: str) -> TokenEliminationConfig:
    try:
        return TokenEliminationConfig.load(directory)
    except FileNotFoundError:
        raise UserError(
            f"--token-elimination must be a number, or a directory with a {TokenEliminationConfig.file_name}, got "
            f"{directory}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--token-elimination {directory}: {error}") from error


def _check_directory(directory: str, config: TokenEliminationConfig, seq_len: int) -> None:
    where = f"--token-elimination {directory}:"
    if config.score not in SCORES:
        raise UserError(f"{where} its score must be one of {', '.join(SCORES)} here, got {config.score!r}")
    if not config.train_only:
        raise UserError(f"{where} it must have train_only, as evaluation is dense here")
    if config.seed is not None:
        raise UserError(f"{where} it must have no seed, as every step has its own here, got {config.seed}")
    if seq_len < 2 * config.block_size:
        raise UserError(f"{where} --seq-len must be at least two blocks of its {config.block_size} tokens")


def configuration(settings: Settings) -> TokenEliminationConfig:
    """How the layers of a run eliminate tokens.

    Raises:
        UserError: the directory that says so cannot be read.
    """
    if isinstance(settings.token_elimination, str):
        return _loaded(settings.token_elimination)
    return TokenEliminationConfig(
        keep_ratio=settings.token_elimination,
        score=settings.token_score,  # type: ignore[arg-type]
        block_size=settings.token_block_size,
        select_every=settings.token_select_every,
        layers=settings.token_layer_indices(),
    )  # without a seed: random scores come from torch's generator, which every step seeds
