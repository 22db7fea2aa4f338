"""The Vision Transformer as mathematics: pure functions over a tree of arrays, in PyTorch."""

__version__ = "0.1.0"

from vitfn import quiet as quiet  # isort: skip, the first import of torch, which may print

from vitfn.config import ResNetConfig as ResNetConfig
from vitfn.config import ViTConfig as ViTConfig
from vitfn.config import get_config as get_config
from vitfn.eval_step import make_eval_step as make_eval_step
from vitfn.eval_step import make_predict_step as make_predict_step
from vitfn.optim import adamw as adamw
from vitfn.optim import sgd as sgd
from vitfn.optim import with_ema as with_ema
from vitfn.schedules import warmup_cosine as warmup_cosine
from vitfn.schedules import warmup_linear as warmup_linear
from vitfn.step import TrainState as TrainState
from vitfn.step import make_train_step as make_train_step
from vitfn.vit import apply as apply
from vitfn.vit import init as init
from vitfn.vit import shapes as shapes
from vitfn.weights import load as load
from vitfn.weights import load_npz as load_npz
from vitfn.weights import save as save
from vitfn.weights import save_npz as save_npz
