"""The smallest transformers of diffusers, and text encoders for them."""

import json

WIDTH, POOLED = 12, 5  # of the embeddings of prompts, and of those of whole prompts


def dit(channels, outputs, size):
    """A DiT of ten classes."""
    import diffusers

    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=channels,
        out_channels=outputs,
        num_layers=1,
        sample_size=size,
        num_embeds_ada_norm=10,
    ).eval()


def sd3(size):
    """The network of Stable Diffusion 3, of images with three channels."""
    import diffusers

    return diffusers.SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
    ).eval()


def pixart(size):
    """The network of PixArt, which also gives a variance, as the published ones do."""
    import diffusers

    return diffusers.PixArtTransformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=3,
        out_channels=6,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        cross_attention_dim=8,
        caption_channels=WIDTH,
    ).eval()


def t5(folder, name="text_encoder", *, width=WIDTH):
    """Return a T5 of random weights, with its tokenizer of letters, written to a folder."""
    import transformers

    from nelbo._utils.numerics import seeded

    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    )
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    with seeded(7):
        encoder = transformers.T5EncoderModel(config).eval()
    encoder.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    return encoder, tokenizer


def text_encoder(folder, name="text_encoder", *, pooled=0, seed=0, width=WIDTH):
    """Return a CLIP of random weights, with its tokenizer of single letters, written to a folder.

    Args:
        folder: of the pipeline.
        name: of the encoder's folder; the tokenizer's is named like it.
        pooled: width of its embedding of the whole prompt, 0 for an encoder without one.
        seed: of the weights.
        width: of the embeddings.
    """
    import transformers

    from nelbo._utils.numerics import seeded

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    ids = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(ids) - 2,
        eos_token_id=len(ids) - 1,
        pad_token_id=len(ids) - 1,
        projection_dim=max(1, pooled),
        initializer_factor=4.0,
    )
    kind = transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
    with seeded(seed):
        encoder = kind(config).eval()
    tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    encoder.save_pretrained(folder / name)
    return encoder, tokenizer
