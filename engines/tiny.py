"""wan-tiny: the classes and folder layout of the Wan2.1 I2V diffusers checkpoints, small enough for a CPU.

What is built here is untrained, its weights drawn from a seed; `training.recipe` makes the bundled one of it.
Everything that loads, serves or tests a real checkpoint meets wan-tiny through the same files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging as transformers_logging

# The words of the film set's captions and of most prompts a person tries first; anything else falls back to bytes.
_WORDS = (
    "a an the and or of in on over under behind before past through into out from to with its it is are no not "
    "camera pans pan left right up down zooms zoom still stays moves move moving turns turn turning grows grow growing "
    "shrinks shrink drifts drift wanders wander enters enter leaves leave slowly quickly fast slow pixels per frame "
    "red green blue yellow orange purple pink white black grey gray cyan magenta brown dark light bright pale deep "
    "circle square triangle star ring cross diamond hexagon heart shape shapes object objects "
    "wall sky floor background flat gradient striped stripes checkered checker noisy noise texture textured "
    "smooth fine cluttered nothing everything "
    "small large tiny big two one three another other first last "
    "cat dog person man woman child face eyes street city sea water tree forest field mountain sun moon rain snow "
    "walks walk runs run looks look smiles opens closes blinks wind light shadow film scene shot close wide style noir "
    "amber blueprint"
).split()


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a tiny Wan2.1 I2V model.

    Attributes:
        seed: seeds every weight.
        heads, head_dim, layers, ffn_dim: of the transformer; its width is heads x head_dim.
        text_dim: width of the UMT5 encoder.
        image_dim: width of the CLIP vision encoder, which sees `image_size` pixels in patches of `image_patch`.
        vae_base_dim: channels of the VAE's first level.
        encoder_layers: layers of the text and of the image encoder.
    """

    seed: int = 11
    heads: int = 4
    head_dim: int = 64
    layers: int = 6
    ffn_dim: int = 768
    text_dim: int = 128
    image_dim: int = 128
    image_size: int = 128
    image_patch: int = 32
    vae_base_dim: int = 16
    encoder_layers: int = 2


WAN_TINY = TinyConfig()


def build_tiny(folder: Path, config: TinyConfig = WAN_TINY) -> None:
    """Writes a complete checkpoint folder, all at once or not at all.

    The same config gives the same bytes on every run of one torch version.

    Raises:
        OSError: the folder's parent cannot be written.
    """
    transformers_logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            _pipeline(config).save_pretrained(staging, safe_serialization=True)
        (staging / "cinecat.json").write_text(json.dumps({"family": "wan2.1-i2v-tiny", **asdict(config)}, indent=2))
        staging.chmod(0o755)
        try:
            staging.rename(folder)
        except OSError:
            # Another process built it meanwhile: its bytes are the same.
            if not (folder / "model_index.json").exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _pipeline(config: TinyConfig) -> WanImageToVideoPipeline:
    dim = config.heads * config.head_dim
    tokenizer = _tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=config.text_dim,
            d_kv=32,
            d_ff=2 * config.text_dim,
            num_layers=config.encoder_layers,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
    image_encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.image_dim,
            intermediate_size=2 * config.image_dim,
            num_hidden_layers=config.encoder_layers,
            num_attention_heads=4,
            image_size=config.image_size,
            patch_size=config.image_patch,
        )
    )
    vae = AutoencoderKLWan(
        base_dim=config.vae_base_dim,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=36,
        out_channels=16,
        text_dim=config.text_dim,
        freq_dim=256,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        cross_attn_norm=True,
        image_dim=config.image_dim,
        added_kv_proj_dim=dim,
        rope_max_seq_len=1024,
    )
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        image_encoder=image_encoder.eval(),
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": config.image_size},
            crop_size={"height": config.image_size, "width": config.image_size},
        ),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer over whole words, with bytes for all else, and UMT5's special tokens."""
    special = ["<pad>", "</s>", "<unk>"]
    fallback = [f"<0x{value:02X}>" for value in range(256)]
    letters = list("▁abcdefghijklmnopqrstuvwxyz.,")
    words = [f"▁{word}" for word in dict.fromkeys(_WORDS)]
    scored = [(token, 0.0) for token in special]
    # A word outweighs its spelling, a letter its bytes.
    scored += [(token, -100.0) for token in fallback]
    scored += [(token, -10.0) for token in letters]
    scored += [(token, -1.0) for token in words]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
