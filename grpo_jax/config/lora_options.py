"""The options of low-rank adapters, a part of `options.TABLE`."""

from __future__ import annotations

from grpo_jax.config.schema import COUNT, POSITIVE, choice, flag, number, several, text

# fmt: off
LORA = (
    number("lora.rank", 0, COUNT, "",
           "Rank of the adapters, which learn in place of the model's own weights; 16 is usual",
           special={0: "no adapters: all weights learn"}),
    number("lora.alpha", 32.0, POSITIVE, "", "An adapter's product is scaled by alpha / rank"),
    flag("lora.rank_stabilized", False, "Scale it by alpha / sqrt(rank) (rsLoRA)"),
    several("lora.targets", ("all-linear",), "ends of modules' names, such as \"q_proj\", or "
            "regular expressions of whole names",
            "Dense layers that get an adapter, by Hugging Face's names; \"all-linear\" is all but "
            "the head"),
    several("lora.exclude", (), "as lora.targets", "Dense layers that get none all the same"),
    several("lora.rank_pattern", (), "\"pattern=rank\", such as \"mlp.down_proj=8\"",
            "Layers with another rank, by the ends of their names or regular expressions"),
    several("lora.alpha_pattern", (), "\"pattern=alpha\"", "Layers with another alpha"),
    text("lora.path", "", "folder of PEFT, or hub id",
         "The adapters to go on with, in place of new ones; the options above do not count then, "
         "and algorithm.kl_coef measures from these adapters",
         special={"": "new adapters, which change nothing yet"}),
    choice("lora.base_dtype", "auto", {
               "auto": "as model.dtype, or as in the files of a model in NF4",
               "int8": "the layers' kernels in 8 bits, with a scale for each output",
               "nf4": "in 4 bits, with a scale for each 64 inputs, in 8 bits itself (QLoRA)"},
           "Precision of the weights that do not learn"),
    flag("lora.merge_for_rollout", False,
         "Sample with adapters that are added into the weights and rounded with them, which is "
         "another policy than the one that is scored: policy/sampler_gap_mean says by how much"),
)
