"""Folders of transformers with tiny random masked language models and their tokenizers."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nelbo._utils.numerics import seeded

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*"abcdA \n"]
SIZES = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
KINDS = {
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
    "modernbert": (transformers.ModernBertConfig, transformers.ModernBertForMaskedLM),
    "esm": (transformers.EsmConfig, transformers.EsmForMaskedLM),
    "eurobert": (transformers.EuroBertConfig, transformers.EuroBertForMaskedLM),
}


def write_tokenizer(folder, lower=False, mask=True, spaced=False):
    """Save a tokenizer of letters, with [CLS] and [SEP] around a text; `spaced`: it writes spaces
    between tokens."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, "a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if not spaced:
        made.decoder = decoders.Fuse()
    if lower:
        made.normalizer = normalizers.Lowercase()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"mask_token": "[MASK]"} if mask else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def write(folder, kind="bert", **tokenizer):
    """Save a random model of a kind with its tokenizer."""
    config, model = KINDS[kind]
    with seeded(0):
        more = (
            {"emb_layer_norm_before": False, "token_dropout": False, "mask_token_id": 3}
            if kind == "esm"
            else {}
        )
        made = model(config(**SIZES, **more))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        made.save_pretrained(folder)
    write_tokenizer(folder, **tokenizer)
    return folder


#: of a folder of the model type KIND, whose model may have a time input
CODE = """
import torch
from transformers import BertConfig, BertForMaskedLM

class TimedConfig(BertConfig):
    model_type = "KIND"

class Timed(BertForMaskedLM):
    config_class = TimedConfig
    def forward(self, input_ids, timesteps=None):
        found = super().forward(input_ids)
        if timesteps is not None:
            found.logits = found.logits + timesteps[:, None, None] / 8 * torch.arange(12.0)
        return found
"""


def write_with_code(folder, kind, **config):
    """Save such a folder of the model type `kind`; a bd3lm is called as by its own sampler."""
    home, code = write(folder), f"code_of_{kind}"
    own = CODE.replace("KIND", kind)
    if kind == "bd3lm":
        own = own.replace("timesteps=None", "timesteps, sample_mode=False").replace(
            "        found =",
            "        assert sample_mode and self.config.attn_backend == 'sdpa'\n        found =",
        )
        config = {"block_size": 4, "attn_backend": "flex"} | config
    known = json.loads((home / "config.json").read_text()) | {"model_type": kind} | config
    known["auto_map"] = {
        "AutoConfig": f"{code}.TimedConfig",
        "AutoModelForMaskedLM": f"{code}.Timed",
    }
    (home / "config.json").write_text(json.dumps(known))
    (home / f"{code}.py").write_text(own)
    return home
