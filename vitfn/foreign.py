"""Other people's layouts: timm, Hugging Face transformers, torchvision, DINOv2, DeiT, and the seed."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vitfn.config import ViTConfig
from vitfn.google import POSITIONS
from vitfn.layout import Layout, Shape, renaming, torch_part, torch_restore, torch_store

_BLOCK = "Transformer/encoderblock_{}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"
_MLP = f"{_BLOCK}/MlpBlock_3"
_MAP = "MAPHead_0/MultiHeadDotProductAttention_0"
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

_TIMM = {
    "cls_token": "cls",
    "pos_embed": POSITIONS,
    "patch_embed.proj.*": "embedding/*",
    "patch_embed.backbone.stem.conv.weight": "conv_root/kernel",
    "patch_embed.backbone.stem.norm.*": "gn_root/*",
    "patch_embed.backbone.conv.weight": "conv_root/kernel",  # of R+ViT-Ti_16, whose backbone is its stem
    "patch_embed.backbone.norm.*": "gn_root/*",
    "patch_embed.backbone.stages.{-1}.blocks.{-1}.conv{}.weight": "block{}/unit{}/conv{}/kernel",
    "patch_embed.backbone.stages.{-1}.blocks.{-1}.norm{}.*": "block{}/unit{}/gn{}/*",
    "patch_embed.backbone.stages.{-1}.blocks.{-1}.downsample.conv.weight": "block{}/unit{}/conv_proj/kernel",
    "patch_embed.backbone.stages.{-1}.blocks.{-1}.downsample.norm.*": "block{}/unit{}/gn_proj/*",
    "blocks.{}.norm1.*": f"{_BLOCK}/LayerNorm_0/*",
    "blocks.{}.attn.qkv.*": f"{_ATTENTION}/(query,key,value)/*",
    "blocks.{}.attn.proj.*": f"{_ATTENTION}/out/*",
    "blocks.{}.ls1.gamma": f"{_ATTENTION}/out/gamma",
    "blocks.{}.norm2.*": f"{_BLOCK}/LayerNorm_2/*",
    "blocks.{}.mlp.fc1.*": f"{_MLP}/Dense_0/*",
    "blocks.{}.mlp.fc2.*": f"{_MLP}/Dense_1/*",
    "blocks.{}.ls2.gamma": f"{_MLP}/Dense_1/gamma",
    "norm.*": "Transformer/encoder_norm/*",
    "attn_pool.latent": "MAPHead_0/probe",
    "attn_pool.q.*": f"{_MAP}/query/*",
    "attn_pool.kv.*": f"{_MAP}/(key,value)/*",
    "attn_pool.proj.*": f"{_MAP}/out/*",
    "attn_pool.norm.*": "MAPHead_0/LayerNorm_0/*",
    "attn_pool.mlp.fc1.*": "MAPHead_0/MlpBlock_0/Dense_0/*",
    "attn_pool.mlp.fc2.*": "MAPHead_0/MlpBlock_0/Dense_1/*",
    "pre_logits.fc.*": "pre_logits/*",  # as timm had it until 0.5
    "head.*": "head/*",
}
_TORCHVISION = {
    "class_token": "cls",
    "encoder.pos_embedding": POSITIONS,
    "conv_proj.*": "embedding/*",
    "encoder.layers.encoder_layer_{}.ln_1.*": f"{_BLOCK}/LayerNorm_0/*",
    "encoder.layers.encoder_layer_{}.self_attention.in_proj_*": f"{_ATTENTION}/(query,key,value)/*",
    "encoder.layers.encoder_layer_{}.self_attention.out_proj.*": f"{_ATTENTION}/out/*",
    "encoder.layers.encoder_layer_{}.ln_2.*": f"{_BLOCK}/LayerNorm_2/*",
    "encoder.layers.encoder_layer_{}.mlp.0.*": f"{_MLP}/Dense_0/*",
    "encoder.layers.encoder_layer_{}.mlp.3.*": f"{_MLP}/Dense_1/*",
    "encoder.layers.encoder_layer_{}.mlp.linear_1.*": f"{_MLP}/Dense_0/*",  # until torchvision 0.13
    "encoder.layers.encoder_layer_{}.mlp.linear_2.*": f"{_MLP}/Dense_1/*",
    "encoder.ln.*": "Transformer/encoder_norm/*",
    "heads.pre_logits.*": "pre_logits/*",
    "heads.head.*": "head/*",
    "heads.*": "head/*",  # replaced by hand
}
_SEED = {
    "transformer.embeddings.cls_token": "cls",
    "transformer.embeddings.position_embeddings": POSITIONS,
    "transformer.embeddings.patch_embeddings.*": "embedding/*",
    "transformer.embeddings.hybrid_model.root.conv.weight": "conv_root/kernel",
    "transformer.embeddings.hybrid_model.root.gn.*": "gn_root/*",
    "transformer.embeddings.hybrid_model.body.block{}.unit{}.conv{}.weight": "block{}/unit{}/conv{}/kernel",
    "transformer.embeddings.hybrid_model.body.block{}.unit{}.gn{}.*": "block{}/unit{}/gn{}/*",
    "transformer.embeddings.hybrid_model.body.block{}.unit{}.downsample.weight": "block{}/unit{}/conv_proj/kernel",
    "transformer.embeddings.hybrid_model.body.block{}.unit{}.gn_proj.*": "block{}/unit{}/gn_proj/*",
    "transformer.encoder.layer.{}.attention_norm.*": f"{_BLOCK}/LayerNorm_0/*",
    "transformer.encoder.layer.{}.attn.query.*": f"{_ATTENTION}/query/*",
    "transformer.encoder.layer.{}.attn.key.*": f"{_ATTENTION}/key/*",
    "transformer.encoder.layer.{}.attn.value.*": f"{_ATTENTION}/value/*",
    "transformer.encoder.layer.{}.attn.out.*": f"{_ATTENTION}/out/*",
    "transformer.encoder.layer.{}.ffn_norm.*": f"{_BLOCK}/LayerNorm_2/*",
    "transformer.encoder.layer.{}.ffn.fc1.*": f"{_MLP}/Dense_0/*",
    "transformer.encoder.layer.{}.ffn.fc2.*": f"{_MLP}/Dense_1/*",
    "transformer.encoder.encoder_norm.*": "Transformer/encoder_norm/*",
    "head.*": "head/*",
}
_HUGGING_FACE_EMBEDDINGS = {
    "embeddings.cls_token": "cls",
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.patch_embeddings.projection.*": "embedding/*",
    "layernorm.*": "Transformer/encoder_norm/*",
    "pooler.dense.*": "pre_logits/*",
    "classifier.*": "head/*",
}
_HUGGING_FACE = _HUGGING_FACE_EMBEDDINGS | {  # as the hub's files have it, whatever the version of transformers
    "encoder.layer.{}.layernorm_before.*": f"{_BLOCK}/LayerNorm_0/*",
    "encoder.layer.{}.attention.attention.query.*": f"{_ATTENTION}/query/*",
    "encoder.layer.{}.attention.attention.key.*": f"{_ATTENTION}/key/*",
    "encoder.layer.{}.attention.attention.value.*": f"{_ATTENTION}/value/*",
    "encoder.layer.{}.attention.output.dense.*": f"{_ATTENTION}/out/*",
    "encoder.layer.{}.layernorm_after.*": f"{_BLOCK}/LayerNorm_2/*",
    "encoder.layer.{}.intermediate.dense.*": f"{_MLP}/Dense_0/*",
    "encoder.layer.{}.output.dense.*": f"{_MLP}/Dense_1/*",
}
_HUGGING_FACE_5 = _HUGGING_FACE_EMBEDDINGS | {  # a state_dict() of transformers 5
    "layers.{}.layernorm_before.*": f"{_BLOCK}/LayerNorm_0/*",
    "layers.{}.attention.q_proj.*": f"{_ATTENTION}/query/*",
    "layers.{}.attention.k_proj.*": f"{_ATTENTION}/key/*",
    "layers.{}.attention.v_proj.*": f"{_ATTENTION}/value/*",
    "layers.{}.attention.o_proj.*": f"{_ATTENTION}/out/*",
    "layers.{}.layernorm_after.*": f"{_BLOCK}/LayerNorm_2/*",
    "layers.{}.mlp.fc1.*": f"{_MLP}/Dense_0/*",
    "layers.{}.mlp.fc2.*": f"{_MLP}/Dense_1/*",
}
_HUGGING_FACE_DINOV2 = _HUGGING_FACE_EMBEDDINGS | {
    "encoder.layer.{}.norm1.*": f"{_BLOCK}/LayerNorm_0/*",
    "encoder.layer.{}.attention.attention.query.*": f"{_ATTENTION}/query/*",
    "encoder.layer.{}.attention.attention.key.*": f"{_ATTENTION}/key/*",
    "encoder.layer.{}.attention.attention.value.*": f"{_ATTENTION}/value/*",
    "encoder.layer.{}.attention.output.dense.*": f"{_ATTENTION}/out/*",
    "encoder.layer.{}.attention.q_proj.*": f"{_ATTENTION}/query/*",  # in transformers 5
    "encoder.layer.{}.attention.k_proj.*": f"{_ATTENTION}/key/*",
    "encoder.layer.{}.attention.v_proj.*": f"{_ATTENTION}/value/*",
    "encoder.layer.{}.attention.o_proj.*": f"{_ATTENTION}/out/*",
    "encoder.layer.{}.layer_scale1.lambda1": f"{_ATTENTION}/out/gamma",
    "encoder.layer.{}.norm2.*": f"{_BLOCK}/LayerNorm_2/*",
    "encoder.layer.{}.mlp.fc1.*": f"{_MLP}/Dense_0/*",
    "encoder.layer.{}.mlp.fc2.*": f"{_MLP}/Dense_1/*",
    "encoder.layer.{}.layer_scale2.lambda1": f"{_MLP}/Dense_1/gamma",
}
_HUGGING_FACE_SIGLIP = {
    "embeddings.patch_embedding.*": "embedding/*",
    "embeddings.position_embedding.weight": POSITIONS,
    "encoder.layers.{}.layer_norm1.*": f"{_BLOCK}/LayerNorm_0/*",
    "encoder.layers.{}.self_attn.q_proj.*": f"{_ATTENTION}/query/*",
    "encoder.layers.{}.self_attn.k_proj.*": f"{_ATTENTION}/key/*",
    "encoder.layers.{}.self_attn.v_proj.*": f"{_ATTENTION}/value/*",
    "encoder.layers.{}.self_attn.out_proj.*": f"{_ATTENTION}/out/*",
    "encoder.layers.{}.layer_norm2.*": f"{_BLOCK}/LayerNorm_2/*",
    "encoder.layers.{}.mlp.fc1.*": f"{_MLP}/Dense_0/*",
    "encoder.layers.{}.mlp.fc2.*": f"{_MLP}/Dense_1/*",
    "post_layernorm.*": "Transformer/encoder_norm/*",
    "head.probe": "MAPHead_0/probe",
    "head.attention.in_proj_*": f"{_MAP}/(query,key,value)/*",
    "head.attention.out_proj.*": f"{_MAP}/out/*",
    "head.layernorm.*": "MAPHead_0/LayerNorm_0/*",
    "head.mlp.fc1.*": "MAPHead_0/MlpBlock_0/Dense_0/*",
    "head.mlp.fc2.*": "MAPHead_0/MlpBlock_0/Dense_1/*",
    "classifier.*": "head/*",
}


def _layout(name: str, anchor: str, table: dict[str, str], ignored: str = r"(?!)", **assumed: Any) -> Layout:
    paths, own = renaming(table)
    return Layout(
        name,
        anchor,
        paths,
        lambda path, config: own(path),
        torch_part,
        torch_store,
        torch_restore,
        {"gelu": "erf", "posemb_resize": "bicubic"} | assumed,
        ignored,
        classifiers=("token",),
    )


# What models that learn by filling in masks, and those of images and text, have beside their encoder.
_MASKS = (
    r"(\w+\.)?(embeddings\.)?(mask_token|position_ids)|decoder(_\w+)?(\..*)?"
    r"|text_model\..*|(text|visual)_projection\..*|logit_(scale|bias)"
)


def _timm() -> Layout:
    layout = _layout(
        "timm",
        r"((?:.*[./])?)patch_embed\.proj\.weight",
        _TIMM,
        ignored=_MASKS,
        posemb_resize="bicubic_antialias",
    )

    def own(path: str, config: ViTConfig) -> str:
        name = layout.own(path, config)
        stem_only = config.resnet and not config.resnet.num_layers  # R+ViT-Ti_16, whose backbone is its stem
        return name.replace(".stem.", ".") if stem_only else name

    return layout._replace(own=own, classifiers=("token", "gap", "map"))


def _hugging_face(name: str, table: dict[str, str], **assumed: Any) -> Layout:
    """The base model's names, under a prefix of their own ('vit.') where there is a classifier beside it."""
    (kernel,) = (own.replace("*", "weight") for own, canonical in table.items() if canonical == "embedding/*")
    anchor = rf"((?:.*[./])??)(?:\w+\.)?{re.escape(kernel)}"
    layout = _layout(name, anchor, table, ignored=_MASKS, **assumed)

    def paths(name: str, shape: Shape) -> tuple[str, ...]:
        return layout.paths(name, shape) or layout.paths(name.partition(".")[2], shape)

    def own(path: str, config: ViTConfig) -> str:
        name = layout.own(path, config)
        return f"vit.{name}" if name and config.num_classes and not name.startswith("classifier") else name

    return layout._replace(paths=paths, own=own)


def plain_names(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """What a layout's table calls the arrays of a model, by their names, which training scripts change.

    What lies in a dict beside them ('optimizer/state/...') has none. DINOv2's own runs put blocks into chunks
    ('blocks.1.6.norm1'), and a head that was replaced by hand is a layer in others ('head.1.weight'), which is the head
    if it alone is linear.
    """
    names = {name: re.sub(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.", name) for name in shapes if "/" not in name}
    heads = {name.removesuffix(".weight") for name in shapes if _HEAD.fullmatch(name) and len(shapes[name]) == 2}
    if len(heads) == 1:
        (head,) = heads
        plain = head.rpartition(".")[0]
        names |= {f"{head}.{leaf}": f"{plain}.{leaf}" for leaf in ("weight", "bias") if f"{head}.{leaf}" in shapes}
    if "classifier.weight" in names.values():  # of SigLIP, over the mean of the tokens, without the tower's head
        return {name: plain for name, plain in names.items() if not re.match(r"(vision_model\.)?head\.", name)}
    return names


_HEAD = re.compile(r"(heads?|classifier)\.\d+\.weight")


def family(layout: Layout, prefix: str, found: Mapping[str, Shape], names: Collection[str]) -> dict[str, Any]:
    """What is known of a file in timm's names by whose it is: the prefix, and the other arrays under it, tell."""
    if layout is not TIMM:
        return {}
    words = re.split(r"[./]", prefix)
    if any(name.startswith("decoder") for name in names):  # MAE
        return {"posemb_resize": "bicubic", **IMAGENET}
    chunked = any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names)
    if chunked or "mask_token" in names or not {"teacher", "student"}.isdisjoint(words):  # Meta's DINO and DINOv2
        return {"posemb_resize": "bicubic_offset", **IMAGENET}
    if prefix.startswith("model/"):  # DeiT
        return {"posemb_resize": "bicubic", **IMAGENET}
    scaled = any(path.endswith("/gamma") for path in found)
    return IMAGENET if scaled and "cls" in found else {}  # timm's copies of DINOv2 and DeiT-III


TIMM = _timm()
TORCHVISION = _layout(
    "torchvision", r"((?:.*[./])?)conv_proj\.weight", _TORCHVISION, posemb_resize="bicubic_corners", **IMAGENET
)
SEED = _layout(
    "seed",
    r"((?:.*[./])?)transformer\.embeddings\.patch_embeddings\.weight",
    _SEED,
    dropout_rate=0.1,
    posemb_resize="bilinear_corners",
)
HUGGING_FACE = _hugging_face("huggingface", _HUGGING_FACE, layer_norm_eps=1e-12)
HUGGING_FACE_5 = _hugging_face("huggingface5", _HUGGING_FACE_5, layer_norm_eps=1e-12)
HUGGING_FACE_DINOV2 = _hugging_face("huggingface_dinov2", _HUGGING_FACE_DINOV2, **IMAGENET)
HUGGING_FACE_SIGLIP = _hugging_face("huggingface_siglip", _HUGGING_FACE_SIGLIP, gelu="tanh")
LAYOUTS = (TIMM, HUGGING_FACE, HUGGING_FACE_5, TORCHVISION, SEED)
READ_ONLY = (HUGGING_FACE_DINOV2, HUGGING_FACE_SIGLIP)

# Names by which one knows an architecture that vitfn does not compute.
_REFUSED = {
    r"reg_token|register_tokens": "register tokens",
    r"rope|rotary|freqs": "rotary positions",
    r"[qk]_norm|norm_[qk]\b": "normalised queries and keys",
    r"mlp\.(w12|w3|fc1_g|norm|gate_proj|up_proj)|weights_in": "a gated or normalised MLP",
    r"q_bias|v_bias": "a query and value bias without a key's",
    r"dist_token|distillation_token|head_dist": "a distillation token",
    r"norm_pre|pre_layr?norm": "a norm before the first block",
    r"fc_norm": "a norm after pooling",
    r"relative_position|rel_pos": "relative positions",
    r"patchln_": "normalised patches",
    r"gamma_[12]\b": "LayerScale under a name that plain Vision Transformers do not have",  # EVA
}


def unsupported(found: Mapping[str, Shape], unknown: Collection[str]) -> str | None:
    """What a model has that vitfn cannot compute, by the shapes of the leaves known and the other arrays' names."""
    if POSITIONS not in found:
        return "no position embeddings (rotary or relative ones?)"
    for pattern, what in _REFUSED.items():
        for name in unknown:
            if re.search(pattern, name):
                return f"{what} ({name})"
    outputs, inputs = (found.get(f"{_MLP.format(0)}/Dense_{i}/kernel", ()) for i in (0, 1))
    if len(outputs) == len(inputs) == 2 and outputs[1] == 2 * inputs[0]:
        return f"a gated MLP (of {outputs[1]} features, {inputs[0]} go on)"
    width, head = found.get("embedding/kernel", ())[3:], found.get("head/kernel", ())[:1]
    if width and head == (2 * width[0],):
        return "a head over the class token beside the mean of the patches"
    return None
