"""sentence-transformers with hard negatives: MultipleNegativesRankingLoss by m3bind."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from m3bind.integrations.sentence_transformers import MultipleNegativesRankingLoss

ORGANS = ("lung", "heart", "liver", "kidney", "retina", "skin", "bone", "brain")
FINDINGS = {"normal": "healthy", "enlarged": "big", "inflamed": "swollen", "calcified": "stony"}

# (anchor, positive, hard negative): the hard one says the contrary in almost the same words.
triplets = [
    (f"{organ} {technical}", f"{plain} {organ}", f"no {plain} {organ}")
    for organ in ORGANS
    for technical, plain in FINDINGS.items()
]
words = sorted({word for triplet in triplets for text in triplet for word in text.split()})
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

torch.manual_seed(0)
model = SentenceTransformer(
    modules=[StaticEmbedding(tokenizer, embedding_dim=32)],
    device="cpu",
    similarity_fn_name="cosine",
)
options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
loss_fn = MultipleNegativesRankingLoss(model, **options)
theirs = losses.MultipleNegativesRankingLoss(model, **options)


def features():
    """One column a place in the triplets; a tokenised batch is used up by the model."""
    return [model.preprocess(list(column)) for column in zip(*triplets, strict=True)]


print(f"{len(triplets)} triplets, for example {triplets[0]}")
print(f"sentence-transformers: loss {theirs(features(), None).item():.6f}")
print(f"m3bind:                loss {loss_fn(features(), None).item():.6f}")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
for step in range(40):
    loss = loss_fn(features(), None)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0:
        first = loss.item()
    if step % 10 == 0:
        print(f"step {step:2d}  loss {loss.item():.4f}")
print(f"loss {first:.4f} -> {loss.item():.4f}")

anchors, positives, negatives = map(model.encode, zip(*triplets, strict=True))
found = model.similarity(anchors, [*positives, *negatives]).argmax(1)
print(f"{(found == torch.arange(len(found))).sum().item()} of {len(found)} find their paraphrase")
