"""Run the Python code of notebook.sh, as in the cells of a notebook."""

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.teacher.demo_model import demo_model

cache = CacheDataset("my-cache")
print(cache)
print(cache[0]["targets"])
ids, weights = cache[0]["targets"][0]
print(ids, weights)
print({name: tensor.shape for name, tensor in cache[0:2].items()})

student = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=cache.identity.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
trainer = SparseKDTrainer(
    student,
    TrainingArguments("trained", max_steps=4, per_device_train_batch_size=2, logging_steps=2),
    train_dataset=cache,
    alpha=0.1,
)
trainer.train()
trainer.save_model("my-student")
AutoTokenizer.from_pretrained(demo_model()).save_pretrained("my-student")
