"""Fields of TRL's configurations: obeyed, set elsewhere, or refused.

One table for recipes, functions, checks and the page docs/recipe.md. It imports neither torch nor TRL: a refused field
never reaches a run folder, and with it no token. `training.settings` compares the table with the installed TRL.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from hf_contmerge.runtime.fields import LARGEST_SEED
from hf_contmerge.runtime.hiding import shown
from hf_contmerge.runtime.patterns import require_quick

Use = Literal["obeyed", "elsewhere", "refused"]


def _number(value: Any) -> Any:
    """Read a quoted number, such as "1e3". Raises ValueError for booleans."""
    if isinstance(value, bool):
        raise ValueError("no number")
    return float(value) if isinstance(value, str) else value


def _from(least: float) -> AfterValidator:
    def check(value: float) -> float:
        if not math.isfinite(value) or value < least:
            raise ValueError("out of range")
        return value

    return AfterValidator(check)


def _limit(value: int) -> int:
    """Refuse 0 steps: the trainer takes them for no limit."""
    if value < 1 and value != -1:
        raise ValueError("no number of steps")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Count = Annotated[Whole, _from(1)]
Seed = Annotated[Whole, _from(0), Field(le=LARGEST_SEED)]
Steps = Annotated[Whole, AfterValidator(_limit)]
Number = Annotated[int | float, BeforeValidator(_number), _from(-math.inf)]
Positive = Annotated[Number, _from(0)]
Auto = Literal["auto"]
_NO = BeforeValidator(lambda value: "no" if value is False else value)
"""YAML 1.1 reads an unquoted `no` as false."""
Interval = Annotated[Literal["no", "steps", "epoch"], _NO]
Counted = Annotated[Literal["no", "all", "non_padding"] | bool, _NO]
Share = Annotated[Positive, Field(le=1)]
Order = Literal["random", "sequential", "group_by_length"]
Cut = Literal["keep_start", "keep_end"]
Start = Literal["fork", "spawn", "forkserver"]
Options = dict[str, Any]

_WORDS: dict[Any, str] = {
    None: "null", bool: "true or false", str: "a word", list[str]: "a list of words",
    Interval: "no, steps or epoch", Counted: "no, all or non_padding", Order: "random, sequential or group_by_length",
    Cut: "keep_start or keep_end", Start: "fork, spawn or forkserver", Share: "a number from 0 to 1",
    Whole: "a whole number", Seed: f"a whole number from 0 to {LARGEST_SEED}",
    Count: "a whole number from 1 on", Steps: "a whole number from 1 on, or -1",
    Number: "a number", Positive: "a number from 0 on", list[Number]: "a list of numbers", Auto: "`auto`",
    Options: "a mapping",
}  # fmt: skip


@dataclass(frozen=True)
class TrlField:
    """The treatment of one field."""

    use: Use
    types: tuple[Any, ...] = ()
    """Of an obeyed field's values; None for null."""
    reason: str = ""
    """Elsewhere: the place. Refused: why, and what to do."""
    harmless: tuple[Any, ...] = ()
    """Values of a refused field that ask for nothing."""
    whole_run: bool = False
    """Cannot differ between stages."""

    def read(self, name: str, value: Any) -> Any:
        """Return a value in the field's type. Raises ValueError."""
        if self.use == "elsewhere":
            raise ValueError(f"{name} is set by {self.reason}; remove it from `train`")
        if self.use == "refused":
            if any(value is harmless or value == harmless for harmless in self.harmless):
                return value
            raise ValueError(f"{name} is refused: {self.reason}")
        accepted: Any = self.types[0]
        for other in self.types[1:]:
            accepted = accepted | other
        try:
            return TypeAdapter(accepted).validate_python(value)
        except ValidationError as error:
            words = " or ".join(_WORDS.get(kind, "a positive number") for kind in self.types)
            got = "" if isinstance(value, dict) else f"; got {shown(value)}"  # a mapping might hold a token
            raise ValueError(f"{name} must be {words}{got}") from error


def _obeyed(names: str, *types: Any, whole_run: bool = False) -> Iterator[tuple[str, TrlField]]:
    yield from ((name, TrlField("obeyed", types, whole_run=whole_run)) for name in names.split())


def _elsewhere(name: str, place: str) -> Iterator[tuple[str, TrlField]]:
    yield name, TrlField("elsewhere", reason=place)


def _refused(names: str, reason: str, *harmless: Any) -> Iterator[tuple[str, TrlField]]:
    yield from ((name, TrlField("refused", reason=reason, harmless=harmless)) for name in names.split())


def _quick(pattern: str) -> str:
    require_quick(pattern)
    return pattern


_DTYPES = ("float32", "bfloat16", "float16", "auto")
_LOADING = ("attn_implementation", "dtype", "experts_implementation")


def _loading(value: Options) -> Options:
    """Refuse arguments of `from_pretrained` for other files, formats or code."""
    for key, argument in value.items():
        named = key in _LOADING and isinstance(argument, str) and re.fullmatch(r"\w+", argument)  # owner/name is code
        if not named or (key == "dtype" and argument not in _DTYPES):
            raise ValueError("no name of transformers")
    return value


Loading = Annotated[Options, AfterValidator(_loading)]
_WORDS[Loading] = (
    "a mapping with `attn_implementation` or `experts_implementation` (words of transformers, no Hub repository) or "
    f"`dtype` ({', '.join(_DTYPES)}); other arguments could load other files or code, so it must be that"
)

Modules = Annotated[str, AfterValidator(_quick)]
_WORDS |= {Modules: "a word or a pattern that matches quickly", list[Modules]: "a list of them"}

_EVALUATION = (
    "a stage is not evaluated while it trains, because the run measures every expert and merge. Use `evaluate`."
)
_BEST = "a stage keeps its last weights, because nothing is evaluated while it trains. Remove it."
_PUSHING = (
    "a stage pushes nothing to the Hub, and a recipe holds no token. Set `publish` and run `contmerge push`; log in "
    "with `hf auth login`."
)
_TRACKERS = "one tracker run covers the whole recipe and is called by its `name`. Set `name`, and `report_to`."
_COLUMNS = "the stage's `dataset` names its columns and prepares its rows. Use `text` or `messages` there."
_SAMPLING = "answers are sampled by the fields with names of their own. Use `temperature`, `top_p`, `top_k`, ..."
_VLLM = (
    "a stage's answers are sampled by the model that is trained, in its process: a stopped training resumes with the "
    "same bytes. Remove it."
)
_COMPLETIONS = "a training's log has numbers only. Measure an `exact_match` task to see answers."
_RANKS = "the launcher starts and connects the ranks. Use `accelerate launch --config_file` or `torchrun`."
_RESUME = "a stopped training must resume as if it had not stopped. Remove it."
_MOVING = f"no checkpoint keeps a reference that moves, and {_RESUME}"

TRL_FIELDS: Mapping[str, TrlField] = dict((
    # The length of a training, its batches and its optimizer
    *_obeyed("max_steps", Steps),
    *_obeyed("num_train_epochs", Annotated[Positive, Field(gt=0)]),
    *_obeyed("per_device_train_batch_size gradient_accumulation_steps", Count),
    *_obeyed("learning_rate warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm", Positive),
    *_obeyed("lr_scheduler_type optim", str),
    *_obeyed("lr_scheduler_kwargs", Options, None),
    *_obeyed("optim_args", str, None),
    *_obeyed("optim_target_modules", Modules, list[Modules], None),
    *_obeyed("average_tokens_across_devices auto_find_batch_size", bool),
    *_obeyed("label_smoothing_factor", Positive),
    *_obeyed("neftune_noise_alpha router_aux_loss_coef", Positive, None),
    # Precision, memory and speed
    *_obeyed("bf16 tf32 activation_checkpointing", bool, None),
    *_obeyed("fp16 gradient_checkpointing activation_offloading use_cache", bool),
    *_obeyed("activation_checkpointing_kwargs gradient_checkpointing_kwargs", Options, None),
    *_obeyed("torch_compile use_liger_kernel full_determinism", bool),
    *_obeyed("torch_compile_backend torch_compile_mode", str, None),
    *_obeyed("liger_kernel_config", Options, None),
    *_obeyed("torch_empty_cache_steps", Count, None),
    *_obeyed("use_cpu", bool, whole_run=True),
    *_obeyed("model_init_kwargs", Loading, None),
    # Tokens and losses
    *_obeyed("eos_token pad_token chat_template_path", str, None, whole_run=True),
    *_obeyed("max_length", Count, None),
    *_obeyed("truncation_mode", Cut),
    *_obeyed("packing_strategy", str),
    *_obeyed("pad_to_multiple_of", Count, Auto, None),
    *_obeyed("packing padding_free assistant_only_loss", bool),
    *_obeyed("shuffle_dataset", bool, None),
    *_obeyed("completion_only_loss", bool, None),
    *_obeyed("loss_type", str, list[str]),
    # Preference pairs
    *_obeyed("beta label_smoothing f_alpha_divergence_coef discopop_tau ref_model_mixup_alpha", Number),
    *_obeyed("ld_alpha", Share, None),
    *_obeyed("desirable_weight undesirable_weight", Positive),
    *_obeyed("loss_weights", list[Number], None),
    *_obeyed("f_divergence_type", str),
    *_obeyed("disable_dropout precompute_ref_log_probs use_weighting", bool),
    *_obeyed("precompute_ref_batch_size", Count, None),
    *_obeyed("ref_model_sync_steps", Count),
    # Answers that the model samples
    *_obeyed("num_generations num_iterations max_completion_length", Count),
    *_obeyed("max_prompt_length generation_batch_size steps_per_generation", Count, None),
    *_obeyed("temperature repetition_penalty", Annotated[Positive, Field(gt=0)]),
    *_obeyed("top_p", Share),
    *_obeyed("top_k", Annotated[Whole, _from(0)]),
    *_obeyed("min_p", Share, None),
    *_obeyed("chat_template_kwargs", Options, None),
    *_obeyed("cache_implementation", str, None),
    *_obeyed("ds3_gather_for_generation", bool),
    *_refused("generation_kwargs", _SAMPLING, None),
    *_refused("use_vllm vllm_enable_sleep_mode use_teacher_server use_transformers_continuous_batching", _VLLM, False),
    *_refused("use_transformers_paged", _VLLM, False),
    *_refused("vllm_mode", _VLLM, "colocate"),
    *_refused("vllm_model_impl", _VLLM, "vllm"),
    *_refused("vllm_server_host", _VLLM, "0.0.0.0"),
    *_refused("vllm_server_port", _VLLM, 8000),
    *_refused("vllm_server_timeout", _VLLM, 240.0),
    *_refused("vllm_group_port", _VLLM, 51216),
    *_refused("vllm_gpu_memory_utilization", _VLLM, 0.3),
    *_refused("vllm_tensor_parallel_size", _VLLM, 1),
    *_refused("vllm_importance_sampling_correction", _VLLM, True),
    *_refused("vllm_importance_sampling_mode", _VLLM, "sequence_mask"),
    *_refused("vllm_importance_sampling_clip_max", _VLLM, 3.0),
    *_refused("vllm_structured_outputs_regex vllm_server_base_url vllm_max_model_length", _VLLM, None),
    *_refused("vllm_importance_sampling_clip_min vllm_importance_sampling_cap", _VLLM, None),
    *_refused("transformers_continuous_batching_config", _VLLM, None),
    *_refused("log_completions log_unique_prompts", _COMPLETIONS, False),
    *_refused("log_multimodal", _COMPLETIONS, True),
    *_refused("num_completions_to_print log_completions_hub_repo", _COMPLETIONS, None),
    *_refused("num_generations_eval", _EVALUATION, None),
    # Rewards
    *_obeyed("epsilon sapo_temperature_neg sapo_temperature_pos", Positive),
    *_obeyed("delta epsilon_high off_policy_mask_threshold", Positive, None),
    *_obeyed("vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", Positive),
    *_obeyed("importance_sampling_level multi_objective_aggregation", str),
    *_obeyed("scale_rewards", str, bool),
    *_obeyed("reward_weights", list[Number], None),
    *_obeyed("mask_truncated_completions use_adaptive_entropy use_bias_correction_kl cast_lm_head_to_fp32", bool),
    *_obeyed("top_entropy_quantile", Share),
    *_obeyed("entropy_coef entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", Number),
    *_refused("max_tool_calling_iterations", "the answers of a stage call no tools. Remove it.", None),
    # Self-distillation
    *_obeyed("distillation_alpha teacher_update_rate", Share),
    *_obeyed("distillation_mode teacher_model_kind teacher_prompt_template", str),
    *_obeyed("distillation_topk", Count, None),
    *_obeyed("distillation_is_clip", Positive, None),
    *_obeyed("distillation_add_tail generate_from_teacher", bool),
    *_obeyed("num_loss_tokens_to_skip", Annotated[Whole, _from(0)]),
    *_obeyed("teacher_sync_steps", Count),
    # Checkpoints
    *_obeyed("save_strategy", Interval),
    *_obeyed("save_steps", Positive),
    *_obeyed("save_total_limit", Count, None),
    *_obeyed("enable_jit_checkpoint ignore_data_skip", bool),
    *_refused("save_only_model restore_callback_states_from_checkpoint", _RESUME, False),
    *_refused("sync_ref_model", _MOVING, False),
    *_refused("save_on_each_node", "machines share the run folder and would write the same files. Remove it.", False),
    *_elsewhere("resume_from_checkpoint", "the run folder"),
    *_elsewhere("output_dir", "the run folder"),
    # Logs and trackers
    *_obeyed("logging_strategy", Interval),
    *_obeyed("logging_steps", Positive),
    *_obeyed("logging_first_step log_on_each_node logging_nan_inf_filter skip_memory_metrics", bool),
    *_obeyed("include_num_input_tokens_seen", Counted),
    *_obeyed("log_level log_level_replica", str),
    *_obeyed("disable_tqdm", bool, None),
    *_obeyed("debug", str, list[str]),
    *_obeyed("report_to", str, list[str], None, whole_run=True),
    *_refused("run_name trackio_space_id trackio_bucket_id trackio_static_space_id", _TRACKERS, None),
    *_refused("project", _TRACKERS, "huggingface"),
    # Data
    *_obeyed("data_seed", Seed, None),
    *_obeyed("dataset_num_proc dataloader_prefetch_factor", Count, None),
    *_obeyed("dataloader_num_workers", Annotated[Whole, _from(0)]),
    *_obeyed("dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers dataloader_in_order", bool),
    *_obeyed("dataloader_multiprocessing_context", Start, None),
    *_obeyed("train_sampling_strategy", Order),
    *_obeyed("accelerator_config", Options, str, None),
    *_refused("dataset_text_field", _COLUMNS, "text"),
    *_refused("dataset_kwargs label_names", _COLUMNS, None),
    *_refused("remove_unused_columns", _COLUMNS, True, False),  # TRL's own default differs by trainer
    *_refused("length_column_name", _COLUMNS, "length"),
    *_elsewhere("seed", "`seed` of the recipe"),
    *_elsewhere("trust_remote_code", "`trust_remote_code` of the recipe"),
    # Ranks
    *_obeyed("ddp_timeout", Count, whole_run=True),
    *_obeyed("ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph", bool, None),
    *_obeyed("ddp_bucket_cap_mb", Count, None),
    *_obeyed("deepspeed", Options, str, None, whole_run=True),
    *_refused("ddp_backend fsdp fsdp_config parallelism_config", _RANKS, None),
    *_refused("local_rank", _RANKS, -1),
    # What a run does in place of the trainer
    *_refused("eval_strategy", _EVALUATION, "no", False),
    *_refused("eval_steps eval_accumulation_steps eval_packing", _EVALUATION, None),
    *_refused("eval_on_start eval_use_gather_object batch_eval_metrics do_eval do_predict", _EVALUATION, False),
    *_refused("prediction_loss_only bf16_full_eval fp16_full_eval", _EVALUATION, False),
    *_refused("eval_do_concat_batches", _EVALUATION, True),
    *_refused("eval_delay", _EVALUATION, 0),
    *_refused("per_device_eval_batch_size", _EVALUATION, 8),
    *_refused("include_for_metrics", _EVALUATION, []),
    *_refused("do_train", "a stage with a dataset is always trained. Remove it."),
    *_refused("load_best_model_at_end", _BEST, False),
    *_refused("metric_for_best_model greater_is_better", _BEST, None),
    *_refused("push_to_hub hub_always_push", _PUSHING, False),
    *_refused("hub_token hub_private_repo hub_model_id hub_revision", _PUSHING, None),
    *_refused("hub_strategy", _PUSHING, "every_save"),
))  # fmt: skip
"""Name -> use. Only these are obeyed: a field that a newer TRL adds is refused until it has a row."""

TOKENIZER_FIELDS = ("eos_token", "pad_token", "chat_template_path")
"""Fields that change the tokenizer, in experts and merges."""

_SECRET = re.compile(r"token|secret|password|credential|api_?key", re.I)


def read_fields(fields: Mapping[str, Any], *, ours: Container[str], stage: bool = False) -> dict[str, Any]:
    """Return a `train` mapping with TRL's fields in their types.

    Args:
        fields: of a recipe.
        ours: names that are not TRL's, such as `strategy`.
        stage: whether they are one stage's.

    Raises ValueError for a refused field or value. Unknown names pass: the installed TRL decides about them.
    """
    values = {}
    for name, value in fields.items():
        if name in ours:
            values[name] = value
            continue
        row = TRL_FIELDS.get(str(name))
        if row is None:
            if _SECRET.search(str(name)):  # never stored: it might be an old name of `hub_token`
                raise ValueError(f"{name} is refused: {_PUSHING}")
            values[name] = value
            continue
        if stage and row.whole_run:
            raise ValueError(f"{name} applies to the whole run; set it in `train` of the recipe")
        values[name] = row.read(name, value)
    return values
