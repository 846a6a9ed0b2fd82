"""ImageReward's own package on small random weights: the scores that score.py's loading must give.

    python3.11 -m venv ir && source ir/bin/activate
    pip install torch torchvision safetensors 'transformers==4.40' timm==0.6.13 fairscale==0.4.13
    pip install --no-deps image-reward==1.5
    python tests/published/parity.py

writes parity.json: the names and shapes of the package's weights, and its scores.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import common  # noqa: E402

VISION = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
TEXT = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
TEXT |= dict(vocab_size=40, max_position_embeddings=40)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "stars", "two"]
PROMPTS = ["a red circle", "two blue stars", "a " * 50]  # the last is cut off


def tokenizer(folder):
    """BERT's, of a few words."""
    from transformers import BertTokenizer

    Path(folder, "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer.from_pretrained(str(folder))


def images():
    """One for each prompt, wider than high."""
    shape = len(PROMPTS), 3, 40, 56
    return torch.randint(256, shape, generator=common.generator("images")).to(torch.uint8)


def weights(shapes):
    """Random ones, a tensor from its name; small biases, so that images and prompts matter."""
    drawn = {name: torch.randn(s, generator=common.generator(name)) for name, s in shapes.items()}
    matrices = {name: x * 2 / x.shape[-1] ** 0.5 for name, x in drawn.items() if x.ndim > 1}
    return drawn | matrices | {name: x / 10 for name, x in drawn.items() if name.endswith("bias")}


def package():
    """The package's module of the model, without what else it imports."""
    spec = importlib.util.find_spec("ImageReward")
    whole = ModuleType("ImageReward")
    whole.__path__ = spec.submodule_search_locations
    sys.modules |= dict(ImageReward=whole, clip=ModuleType("clip"))
    return importlib.import_module("ImageReward.ImageReward")


def small_model(folder):
    """The package's model, its parts made small."""
    own = package()
    blip = sys.modules["ImageReward.models.BLIP.blip_pretrain"]
    depth = dict(depth=VISION["num_hidden_layers"], num_heads=VISION["num_attention_heads"])
    vit = sys.modules["ImageReward.models.BLIP.vit"].VisionTransformer
    width = VISION["hidden_size"]
    blip.create_vit = lambda *_: (vit(224, embed_dim=width, drop_path_rate=0.1, **depth), width)
    blip.init_tokenizer = lambda: tokenizer(folder)
    head = own.MLP
    own.MLP = lambda _: head(TEXT["hidden_size"])
    config = Path(folder, "med_config.json")
    config.write_text(json.dumps(TEXT | dict(add_cross_attention=True, layer_norm_eps=1e-12)))
    return own.ImageReward(str(config)).eval()


def main():
    from torchvision.transforms.functional import to_pil_image

    with tempfile.TemporaryDirectory() as folder:
        model = small_model(folder)
        found = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
        shapes = {k: list(v.shape) for k, v in found.items()}
        model.load_state_dict(weights(shapes), strict=False)
        with torch.no_grad():
            pairs = [[model.score(p, [to_pil_image(x)]) for x in images()] for p in PROMPTS]
    (HERE / "parity.json").write_text(json.dumps(dict(shapes=shapes, scores=pairs), indent=None))
    print(pairs)


if __name__ == "__main__":
    main()
