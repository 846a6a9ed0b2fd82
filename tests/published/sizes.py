"""The published models with random weights, or of shapes only, and data as large as a batch."""

from functools import cached_property

import torch

import common

SD3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64)
SD3 |= dict(joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm="rms_norm")
MEDIUM = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
MEDIUM |= dict(pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
LARGE = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
LARGE |= dict(pos_embed_max_size=192)
FLUX = dict(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38)
FLUX |= dict(attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096)
FLUX |= dict(pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
# text encoders: class, config, tokens of a prompt
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
CLIP_L = "CLIPTextModelWithProjection", CLIP_L | dict(num_hidden_layers=12), 77
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, projection_dim=1280)
CLIP_G = "CLIPTextModelWithProjection", CLIP_G | dict(num_hidden_layers=32), 77
T5 = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24)
T5 |= dict(feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
OF_SD3 = CLIP_L, CLIP_G, ("T5EncoderModel", T5, 256)
OF_FLUX = CLIP_L, ("T5EncoderModel", T5, 512)
# the published transformers: class, config, text encoders, tokens they are given
CONFIGS = {
    "sd3.5-medium": ("SD3Transformer2DModel", SD3 | MEDIUM, OF_SD3, 333),
    "sd3.5-large": ("SD3Transformer2DModel", SD3 | LARGE, OF_SD3, 333),
    "flux": ("FluxTransformer2DModel", FLUX, OF_FLUX, 512),
}
VAE = dict(in_channels=3, out_channels=3, latent_channels=16, layers_per_block=2)
VAE |= dict(block_out_channels=(128, 256, 512, 512), sample_size=1024)
VAE |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
VAE |= dict(use_quant_conv=False, use_post_quant_conv=False)
VAE |= dict(scaling_factor=1.5305, shift_factor=0.0609)


def give(module, device):
    """A module of the meta device, frozen; elsewhere it gets random weights."""
    if device.type != "meta":
        module = module.to_empty(device=device)
        for x in (*module.parameters(), *module.buffers()):
            x.data.normal_(0, 0.02) if x.is_floating_point() else x.data.zero_()
    return module.eval().requires_grad_(False)


class Backbone(common.Backbone):
    """A published Backbone with random weights, or on the meta device with none."""

    def __init__(self, name, device="meta", dtype=torch.bfloat16):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        self.name = name
        self.device = torch.device(device)
        self.dtype = dtype
        kind, self.config, self.encoders, self.tokens = CONFIGS[name]
        self.transformer_class = getattr(diffusers, kind)
        dynamic = dict(shift=3.0, use_dynamic_shifting=self.is_flux)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**dynamic)

    def prefix(self, i=None):
        with torch.device("meta"):
            transformer = self.transformer_class(**self.config).to(self.dtype)
        if i is not None:
            common.keep_blocks(transformer, i)
        return give(transformer, self.device)

    @cached_property
    def vae(self):
        import diffusers

        with torch.device("meta"):
            vae = diffusers.AutoencoderKL(**VAE)
        return give(vae, self.device)

    def text_encoders(self):
        """[(model, tokens of a prompt)]."""
        import transformers

        found = []
        for kind, config, tokens in self.encoders:
            cls = getattr(transformers, kind)
            with torch.device("meta"):
                model = cls(cls.config_class(**config)).to(self.dtype)
            found.append((give(model, self.device), tokens))
        return found


def random_reward(name, preset, device, dtype=torch.float32, Reward=common.Reward):
    """A published Reward with random weights, its text tower on the CPU."""
    reward = Reward(name, preset, device, dtype, weights=False)
    reward.text_model.cpu()
    return reward


class Published:
    """What a stage loads, when it is first used, and data of the size of its batch."""

    def __init__(self, args, names, device):
        self.args = args
        self.names = names
        self.device = torch.device(device)
        self.dtype = getattr(torch, args.dtype)
        self.backbone = Backbone(args.backbone, device, self.dtype)

    def load(self, *parts):
        """Load parts of the backbone now, so that no step's cost includes it."""
        for part in parts:
            getattr(self.backbone, part)

    @cached_property
    def rewards(self):
        return [random_reward(n, self.args.preset, self.device, self.dtype) for n in self.names]

    def random(self, *shape, dtype=torch.float32):
        return torch.rand(shape, device=self.device, dtype=dtype)

    def latents(self, n):
        return self.random(n, VAE["latent_channels"], *[self.args.resolution // 8] * 2)

    def condition(self, n):
        """(text (n, T, D), pooled (n, P))."""
        c = self.backbone.config
        text = n, self.backbone.tokens, c["joint_attention_dim"]
        return [self.random(*s, dtype=self.dtype) for s in (text, (n, c["pooled_projection_dim"]))]

    def texts(self, n):
        """Of each reward (n, E)."""
        return [self.random(n, reward.visual.output_dim) for reward in self.rewards]

    def value(self, reward, i, transformer=None):
        """A reward's value after block i (0: of the latent itself), before reward block 1."""
        width, grid = reward.visual.conv1.out_channels, reward.visual.grid_size
        channels = transformer.inner_dim if i else VAE["latent_channels"]
        with self.device:
            stitch = common.Stitch(torch.rand(width, channels) / 1000, torch.rand(width), grid)
            given = transformer, self.condition(1), reward, stitch, i, 1
            return common.StitchedValue(*given, front="dit" if i else "vae")

    def values(self, i):
        """The frozen values of all rewards."""
        transformer = self.backbone.transformer
        return [self.value(r, i, transformer).requires_grad_(False) for r in self.rewards]


def optimizer_of(parameters):
    """AdamW as training finds it after its first step: gradients and moments are there."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer
