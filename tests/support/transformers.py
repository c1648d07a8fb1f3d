"""The smallest transformers of diffusers."""

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
