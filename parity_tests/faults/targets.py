"""The functions of jaxlm and torchlm in which faults are planted. Where one moves, only its import here changes."""

from flax import nnx
from torch.nn import LayerNorm, RMSNorm
from torch.optim import AdamW

from jaxlm import distill as jax_distill
from jaxlm import heads as jax_heads
from jaxlm import loss as jax_loss
from jaxlm import model as jax_model
from jaxlm import optim as jax_optim
from jaxlm import schedule as jax_schedule
from jaxlm import step as jax_step
from jaxlm.data.mixture import Mix, MixedSamples
from jaxlm.data.packing import PackedSamples
from jaxlm.data.samples import PairSamples
from jaxlm.data.tagged import TaggedSamples
from jaxlm.ops import activations as jax_activations
from jaxlm.ops import dropout as jax_dropout
from jaxlm.ops import layers as jax_layers
from jaxlm.ops import local_attention, position_tables
from jaxlm.ops import plain_attention as jax_attention
from jaxlm.ops import token_positions as jax_positions
from jaxlm.params import frozen, names
from jaxlm.tasks.embed import Embed as JaxEmbed
from jaxlm.tasks.gpt import Gpt as JaxGpt
from jaxlm.tasks.mlm import Mlm as JaxMlm
from jaxlm.tasks.multilabel import Multilabel as JaxMultilabel
from jaxlm.tasks.regress import Regress as JaxRegress
from jaxlm.tasks.tag import Tag as JaxTag
from jaxlm.training.run import Run
from jaxlm.weights import huggingface
from parity_tests.faults.planting import Pair
from torchlm import distill as torch_distill
from torchlm import heads as torch_heads
from torchlm import loss as torch_loss
from torchlm import model as torch_model
from torchlm import optim as torch_optim
from torchlm import schedule as torch_schedule
from torchlm import step as torch_step
from torchlm.ops import activations as torch_activations
from torchlm.ops import dropout as torch_dropout
from torchlm.ops import layers as torch_layers
from torchlm.ops import plain_attention as torch_attention
from torchlm.ops import token_positions as torch_positions
from torchlm.tasks.embed import Embed as TorchEmbed
from torchlm.tasks.gpt import Gpt as TorchGpt
from torchlm.tasks.mlm import Mlm as TorchMlm
from torchlm.tasks.multilabel import Multilabel as TorchMultilabel
from torchlm.tasks.regress import Regress as TorchRegress
from torchlm.tasks.tag import Tag as TorchTag

framework_norm = Pair(nnx.LayerNorm.__call__, LayerNorm.forward)
framework_rms_norm = Pair(nnx.RMSNorm.__call__, RMSNorm.forward)
pytorch_adamw_step = AdamW.step

initial_weights = Pair(jax_layers.initial_weights, torch_layers.initial_weights)
residual_std = Pair(jax_layers.residual_std, torch_layers.residual_std)
linear = Pair(jax_layers.linear, torch_layers.linear)
add_adapters = Pair(jax_layers.add_adapters, torch_layers.add_adapters)
norm = Pair(jax_layers.norm, torch_layers.norm)
dropout = Pair(jax_dropout.dropout, torch_dropout.dropout)
gelu = Pair(jax_activations.gelu, torch_activations.gelu)
activation = Pair(jax_activations.activation, torch_activations.activation)
rotate = Pair(jax_positions.rotate, torch_positions.rotate)
document_positions = Pair(jax_positions.document_positions, torch_positions.document_positions)
hidden = Pair(jax_attention.hidden, torch_attention.hidden)
attend_in_blocks = local_attention.attend
attend = Pair(jax_attention.attend, torch_attention.attend)
embedding_start = Pair(jax_model.Embedding.__init__, torch_model.Embedding.__init__)
embedding = Pair(jax_model.Embedding.__call__, torch_model.Embedding.forward)
attention = Pair(jax_model.Attention.__call__, torch_model.Attention.forward)
feed_forward = Pair(jax_model.FeedForward.__call__, torch_model.FeedForward.forward)
block = Pair(jax_model.Block.__call__, torch_model.Block.forward)
transformer_start = Pair(jax_model.Transformer.__init__, torch_model.Transformer.__init__)
transformer = Pair(jax_model.Transformer.__call__, torch_model.Transformer.forward)

soft_capped = Pair(jax_heads.soft_capped, torch_heads.soft_capped)
head_linear = Pair(jax_heads.head_linear, torch_heads.head_linear)
lm_head = Pair(jax_heads.LanguageModelHead.__call__, torch_heads.LanguageModelHead.forward)
head_prepared = Pair(jax_heads.Head.prepared, torch_heads.Head.prepared)
head_activation = Pair(jax_heads.Head.activation, torch_heads.Head.activation)
classifier_shares = Pair(jax_heads.Classifier._shares, torch_heads.Classifier._shares)
classifier_head = Pair(jax_heads.ClassifierHead.__call__, torch_heads.ClassifierHead.forward)
classifier = Pair(jax_heads.Classifier.__call__, torch_heads.Classifier.forward)
classifier_start = Pair(jax_heads.Classifier.__init__, torch_heads.Classifier.__init__)
at = Pair(jax_heads._at, torch_heads._at)

cross_entropy = Pair(jax_loss.cross_entropy, torch_loss.cross_entropy)
label_sets = Pair(JaxMultilabel.totals, TorchMultilabel.totals)
regression = Pair(JaxRegress.totals, TorchRegress.totals)
gpt_loss = Pair(JaxGpt.loss, TorchGpt.loss)
lm_loss = jax_heads.LanguageModel.loss
mlm_loss = Pair(JaxMlm.loss, TorchMlm.loss)
embeddings = Pair(jax_heads.embeddings, torch_heads.embeddings)
embed_loss = Pair(JaxEmbed.loss, TorchEmbed.loss)
tag_totals = Pair(JaxTag.totals, TorchTag.totals)
distilled = Pair(jax_distill.loss, torch_distill.loss)
soft_loss = Pair(jax_distill.soft_loss, torch_distill.soft_loss)
cosine_loss = Pair(jax_distill.cosine_loss, torch_distill.cosine_loss)

adamw = Pair(jax_optim.make_optimizer, torch_optim.make_optimizer)
scale_by_adam = jax_optim.scale_by_adam
muon_step = Pair(jax_optim.scale_by_muon, torch_optim.Muon.step)
apart = jax_optim._apart
orthogonal = Pair(jax_optim.orthogonal, torch_optim.orthogonal)
is_decayed = Pair(jax_optim.is_decayed, torch_optim.is_decayed)
rate_shares = Pair(jax_optim.rate_shares, torch_optim.rate_shares)
layer_shares = Pair(jax_optim.layer_shares, torch_optim.layer_shares)
clip = Pair(jax_optim.clip_by_global_norm, torch_optim.clip_by_global_norm)
train_step = Pair(jax_step.train_step, torch_step.train_step)

warmed_up = Pair(jax_schedule.warmed_up, torch_schedule.warmed_up)
n_batches = Pair(jax_schedule.n_batches, torch_schedule.n_batches)
cycled = Pair(jax_schedule.cycled, torch_schedule.cycled)
rewarmup = Pair(jax_schedule.rewarmup, torch_schedule.rewarmup)

trained = frozen.trained
to_jax = names.to_jax
# Both packages have these.
positions = Pair(position_tables.fixed_positions, position_tables.fixed_positions)
frequencies = Pair(position_tables.frequencies, position_tables.frequencies)
pairs = Pair(PairSamples.batch, PairSamples.batch)
tagged_rows = Pair(TaggedSamples.batch, TaggedSamples.batch)
packed_rows = Pair(PackedSamples.batch, PackedSamples.batch)
mixed_rows = Pair(MixedSamples.batch, MixedSamples.batch)
mix_rates = Pair(Mix._rates, Mix._rates)
mix_stretches = Pair(Mix.stretches, Mix.stretches)
mix_state = Pair(Mix.state, Mix.state)
mixed_scores = Pair(Run.scores, Run.scores)
read_weights = Pair(huggingface._weights, huggingface._weights)
read_positions = Pair(huggingface._rotary, huggingface._rotary)
read_pooling = Pair(huggingface._pooling, huggingface._pooling)
