"""A small GPT, decorated, trained on the Python standard library's own sources by the best plan that fits.

    python examples/quickstart.py [steps]

Runs on the GPUs there are, else on eight virtual CPU devices.
"""

import sys

import jax
import optax
from flax import nnx

import galvatron_jax as gx
from galvatron_jax.models.gpt2 import GPT2Block, GPT2Config
from galvatron_jax.runtime.data import TokenWindows, standard_library_bytes

jax.config.update("jax_num_cpu_devices", 8)  # no effect where there are GPUs

CONFIG = GPT2Config(vocab_size=256, seq_length=128, width=128, num_layers=4, num_heads=4, mlp_width=512)


@gx.auto_shard(memory_per_device="1GiB")
class GPT(nnx.Module):
    """An ordinary Flax module: no annotations, no parallel code."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.seq_length, config.width, rngs=rngs)
        self.blocks = nnx.List([GPT2Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jax.numpy.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model: GPT, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy of each next byte."""
    logits = model(batch["tokens"][:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean()


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
example = {"tokens": jax.ShapeDtypeStruct((16, CONFIG.seq_length + 1), "int32")}
data = TokenWindows(standard_library_bytes(), example_batch=example)

model = GPT(CONFIG, rngs=nnx.Rngs(0))  # shapes only: a 70B model costs nothing here
train_step = gx.train_step(model, loss_fn, optax.adamw(2e-3), example)
print(train_step.explain())

state = train_step.init()  # every parameter is born on the devices that hold it
for step in range(steps):
    state, metrics = train_step(state, data.batch(step))
    if step % 10 == 0 or step == steps - 1:
        print(f"step {step + 1}: loss {metrics['loss']:.3f}")
