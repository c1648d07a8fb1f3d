"""Conditional networks of diffusers with random weights, their schedulers and data."""

import torch
from support import transformers as tiny
from support.transformers import POOLED, WIDTH

from nelbo._utils.numerics import seeded

T, SIZE = 6, 8


def text_unet(**config):
    """A UNet2DConditionModel of prompts."""
    import diffusers

    with seeded(0):
        return diffusers.UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            **config,
        ).eval()


def sd3():
    """The network of SD3, no weight of which is zero."""
    with seeded(0):
        network = tiny.sd3(SIZE)
        for weight in network.parameters():  # some begin at zero
            torch.nn.init.normal_(weight, std=0.2)
        return network


def pixart():
    """The network of PixArt, no weight of which is zero."""
    with seeded(0):
        network = tiny.pixart(SIZE)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        return network


def sdxl():
    """The network of SDXL, which takes pooled embeddings and sizes beside prompts."""
    return text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=POOLED + 2 * 6,
    )


def dit():
    """A DiT whose output is not zero."""
    with seeded(0):
        network = tiny.dit(3, 3, SIZE)
        torch.nn.init.normal_(network.proj_out_2.weight)
        torch.nn.init.normal_(network.proj_out_1.weight)
        return network


def ddpm():
    """A schedule of T steps that ends with little signal."""
    import diffusers

    return diffusers.DDPMScheduler(
        num_train_timesteps=T, clip_sample=False, beta_end=0.6, beta_start=0.02
    )


def flow():
    """Flow matching."""
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler()


def images(n=3):
    """Random images of the networks' size."""
    with seeded(1):
        return torch.randint(256, (n, 3, SIZE, SIZE))


def prompts(n=3, length=4):
    """Random embeddings of prompts."""
    with seeded(2):
        return torch.randn(n, length, WIDTH)
