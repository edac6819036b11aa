"""The networks of the canvas: a scaled-down Stable Diffusion 1.x and its judge."""

from collections.abc import Iterable
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .canvas import OBJECTS, STYLES

WIDTH = 256
POSITIONS = 24


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        norm_num_groups=32,
    )


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """256 wide, 3 layers, 64-wide heads, 24 positions, over a vocabulary of the given size."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=WIDTH // 64,
            max_position_embeddings=POSITIONS,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def make_unet(width: int = WIDTH) -> UNet2DConditionModel:
    """Attention on the two lower levels only: at 16x16 it costs most of the time."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=width,
    )


class TextReader(nn.Module):
    """Tells style and object from hidden states: what the text encoder is trained by.

    hidden [n, positions, WIDTH] -> (style logits [n, positions, styles + 1],
    object logits [n, positions, objects + 1]); the last class means "not named".
    """

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Linear(WIDTH, len(STYLES) + 1)
        self.object = nn.Linear(WIDTH, len(OBJECTS) + 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.style(hidden), self.object(hidden)


class Judge(nn.Module):
    """Tells style and object from a picture: four strided convolution blocks and two heads.

    pictures [n, 3, 64, 64] in [0, 1] -> (style logits [n, 8], object logits [n, objects]).
    """

    def __init__(
        self, widths: Iterable[int] = (48, 96, 160, 224), objects: int = len(OBJECTS)
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        before = 3
        for width in widths:
            blocks += [
                nn.Conv2d(before, width, 4, stride=2, padding=1),
                nn.BatchNorm2d(width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.GELU(),
            ]
            before = width
        self.features = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(0.2)
        self.style = nn.Linear(before * 16, len(STYLES))
        self.object = nn.Linear(before * 16, objects)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.dropout(self.features(pictures * 2 - 1).flatten(1))
        return self.style(features), self.object(features)


WEIGHTS = str(Path(__file__).parent.parent / "emoji-judge.safetensors")


def load_judge(path: str = WEIGHTS) -> Judge:
    from safetensors.torch import load_file

    weights = {name: value.float() for name, value in load_file(path).items()}
    judge = Judge(objects=len(weights["object.weight"]))
    judge.load_state_dict(weights)
    return judge.eval()
