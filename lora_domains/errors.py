"""Every error this package raises on purpose.

    LoraDomainsError
    ├── UsageError            an unknown flag, setting or name, or a call that cannot be carried out
    ├── DomainError           a setting out of range, an unsafe name, or a broken recipe
    ├── DataError             rows that cannot be used: in which file, line and column
    │   ├── EmptyCell         a cell without text where text or a label belongs
    │   ├── AnswerTooLong     an answer that leaves no room for any of its prompt
    │   ├── ChatTemplateError     a conversation that the base's chat template cannot render
    │   └── LeakError         test rows that are also training rows
    ├── JudgeError            a program that judges answers and fails, or writes no scores
    ├── BaseModelError        a base that cannot be found, loaded or used, or that changed
    ├── AdapterError          an adapter that cannot be loaded, saved or used
    │   ├── AdapterMismatch       made on another base
    │   ├── AdapterCorrupt        missing, extra, misshapen, changed or non-finite tensors
    │   └── AdapterUnsupported    a PEFT method or option that is not supported
    └── TrainingError         training stopped
        ├── LossExploded          a loss that is NaN, infinite or far above the first
        ├── OutOfMemory           not enough memory for a single row
        └── TrainingInterrupted   Ctrl-C or SIGTERM; the best finished epoch is saved

Each has ``expected``, ``found``, ``where`` and ``hint``.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec


class LoraDomainsError(Exception):
    """Base class of the errors of this package.

    ``where`` names a file, row, column or setting; ``hint`` says how to fix it.
    """

    def __init__(self, *, expected: str, found: str, hint: str, where: str = "") -> None:
        self.expected = expected
        self.found = found
        self.hint = hint
        self.where = where
        place = f"{where}: " if where else ""
        super().__init__(f"{place}expected {expected}; found {found}. {hint}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments cannot be unpickled without this.
        return _rebuild, (type(self), self.expected, self.found, self.hint, self.where)


def _rebuild(
    kind: type[LoraDomainsError], expected: str, found: str, hint: str, where: str
) -> LoraDomainsError:
    return kind(expected=expected, found=found, hint=hint, where=where)


class UsageError(LoraDomainsError):
    """An unknown flag, setting, metric or name, or a call that cannot be carried out."""


class DomainError(LoraDomainsError):
    """A setting out of range, an unsafe name, or a recipe that cannot be loaded."""


class DataError(LoraDomainsError):
    """Rows that cannot be used."""


class EmptyCell(DataError):
    """A cell without text where text or a label belongs."""


class AnswerTooLong(DataError):
    """An answer that leaves no room for any of its prompt."""


class ChatTemplateError(DataError):
    """A conversation that the base's chat template refuses, or renders without its answers."""


class LeakError(DataError):
    """Test rows that are also training rows."""


class JudgeError(LoraDomainsError):
    """A program that judges answers failed, or wrote something else than scores."""


class BaseModelError(LoraDomainsError):
    """A base that cannot be found, loaded or used, or whose weights changed."""


class AdapterError(LoraDomainsError):
    """An adapter that cannot be loaded, saved or used."""


class AdapterMismatch(AdapterError):
    """The adapter was made on another base."""


class AdapterCorrupt(AdapterError):
    """Tensors are missing, extra, misshapen, changed or non-finite."""


class AdapterUnsupported(AdapterError):
    """The adapter uses a PEFT method or option that is not supported."""


class TrainingError(LoraDomainsError):
    """Training stopped."""


class LossExploded(TrainingError):
    """The loss became NaN, infinite or far larger than the first."""


class OutOfMemory(TrainingError):
    """There is not enough memory for a single row."""


class TrainingInterrupted(TrainingError):
    """Training was interrupted by a signal; the best finished epoch is saved."""


def did_you_mean(word: str, known: Iterable[str], *, elsewhere: bool = False) -> str:
    """A sentence with the known names most similar to ``word``, or with all names.

    With ``elsewhere`` those that other tools call ``word`` come first.
    """
    names = sorted(known)
    near = (known_here(word, names) if elsewhere else []) or get_close_matches(
        word, names, n=3, cutoff=0.6
    )
    if near:
        return "Did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "Known: " + ", ".join(map(repr, names)) + "."


ELSEWHERE = {
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "max_steps": "max_train_steps iters num_steps",
    "lr": "learning_rate learning_rate_multiplier",
    "rank": "lora_rank lora_r r lora_dim",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target target_modules lora_target_modules lora_modules",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "batch_size": "per_device_train_batch_size micro_batch_size "
    "train_batch_size gradient_accumulation_steps",
    "optimizer": "optim",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup": "warmup_ratio warmup_steps num_warmup_steps",
    "clip": "max_grad_norm gradient_clipping grad_clip",
    "patience": "early_stopping_patience early_stop",
    "balance": "class_weights class_weight sampling_strategy",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "tracker": "report_to logger",
    "init_from": "adapter_name_or_path lora_path",
    "resume": "resume_from_checkpoint",
    "seed": "random_seed random_state",
    "base": "model model_name model_path model_name_or_path base_model pretrained "
    "pretrained_model_name_or_path",
    "load_in_4bit": "quantization_bit quantization quantize",
    "max_length": "cutoff_len max_seq_length max_seq_len model_max_length sequence_len max_len",
    "chat": "template chat_template apply_chat_template",
    "system": "system_prompt system_instruction default_system",
    "max_tokens": "max_new_tokens max_gen_toks",
    "temperature": "temp",
    "train": "dataset data data_path dataset_path train_file train_data train_dataset training_set",
    "validation": "val val_size val_set_size valid validation_file validation_set eval_dataset "
    "eval_data eval_file dev",
    "test": "test_file test_data test_set test_dataset",
    "input": "dataset data input_file input_path file data_path",
    "text": "text_column text_col input_column input_columns input_features feature sentence",
    "label": "label_column label_col target target_column output_column output_features response",
    "limit": "max_samples max_train_samples num_samples",
    "suite": "tasks task benchmark",
    "metric": "metrics metric_for_best_model",
    "refer_below": "threshold confidence",
    "out": "output_dir out_dir output_directory save_dir output_path export_dir",
    "output": "output_file output_path output_dir out_file predictions",
    "overwrite": "force overwrite_output_dir",
    "quiet": "silent q",
    "licence": "license_id",
    "api_key_file": "api_keys",
    "fit": "train finetune fine_tune tune sft",
    "evaluate": "eval test score",
    "predict": "infer inference generate classify run",
    "export": "merge convert quantize save",
    "serve": "api server deploy",
    "playground": "webui web ui webchat demo gradio gui",
    "list": "ls adapters",
    "show": "info card inspect",
    "push": "upload publish",
    "doctor": "env check version",
    "init": "new create init_config",
    "cross-validate": "cv kfold cross_validation",
}
"""Names that other tools have for flags, settings and verbs, by our name."""


def known_here(word: str, known: Iterable[str]) -> list[str]:
    """Which of the flags, settings or verbs in ``known`` other tools call ``word``.

    ``--lora-alpha`` is ``lora.alpha`` and ``--load_in_4bit`` is ``--load-in-4bit``.
    """
    plain = _plain(word)
    ours = [_plain(our) for our, others in ELSEWHERE.items() if plain in others.split()]
    names = {name: _plain(name) for name in known}
    same = [name for name, here in names.items() if here == plain]
    return same or [n for n, here in names.items() if here in ours]


def _plain(name: str) -> str:
    """``name`` without dashes before it or the part of a domain: lr of training.lr."""
    return name.lstrip("-").replace("-", "_").lower().rpartition(".")[2]


def check_installed(
    where: str, expected: str, extra: str, packages: Iterable[str], *, instead: str = ""
) -> None:
    """Raise UsageError unless ``packages`` are installed, with the command for their ``extra``.

    ``instead`` is another way.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            where=where,
            expected=expected,
            found=f"{listed(missing)} not installed",
            hint=f"pip install 'lora-domains[{extra}]'" + (f", or {instead}." if instead else ""),
        )


MOST_LISTED = 8
"""Values that an error lists in full."""


def listed(values: Iterable[object], most: int = MOST_LISTED) -> str:
    """``values`` separated by commas; after ``most`` of them, the number of the others."""
    items = [str(value) for value in values]
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
