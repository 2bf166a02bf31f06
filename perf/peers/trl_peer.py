"""TRL's trainers, and transformers' `generate`, as a peer of perf/main.py.

Runs in an environment that holds trl, peft and PyTorch, and is started by
perf/bench.py. The model is a Llama of random weights,
with PEFT's LoRA on all matrices of its layers.
Steps are those of the trainers' own loop, from its on_step_begin to its on_step_end.
"""

import random
import tempfile
import time

import peft
import protocol
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

SOFTWARE = f"trl {trl.__version__}, torch {torch.__version__}"
STEPS = 10**6  # Of training: more than anyone asks for.
ROWS = 64  # Of the data.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
  line = protocol.begin()
  torch.set_num_threads(line.job["threads"])
  torch.manual_seed(0)
  JOBS[line.job["what"]](line)


def device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def wait_for_device() -> None:
  if device() == "cuda":
    torch.cuda.synchronize()


def model_of(job: dict) -> transformers.PreTrainedModel:
  """Random weights, without LoRA."""
  config = transformers.LlamaConfig(
    vocab_size=job["vocab"],
    hidden_size=job["embed"],
    intermediate_size=job["mlp"],
    num_hidden_layers=job["layers"],
    num_attention_heads=job["heads"],
    num_key_value_heads=job["kv_heads"],
    max_position_embeddings=8192,
    bos_token_id=None,
    eos_token_id=job["vocab"] - 1,
    pad_token_id=0,
  )
  with torch.device(device()):
    return transformers.AutoModelForCausalLM.from_config(
      config, dtype=DTYPES[job["dtype"]], attn_implementation="sdpa"
    )


def lora_of(job: dict) -> peft.LoraConfig:
  return peft.LoraConfig(
    r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear"
  )


def tokenizer_of(job: dict) -> transformers.PreTrainedTokenizerFast:
  """A token for each word: "7 12 9" is the ids 7, 12 and 9."""
  words = {str(i): i for i in range(1, job["vocab"] - 1)}
  words |= {"<pad>": 0, "<end>": job["vocab"] - 1}
  made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="<pad>", eos_token="<end>"
  )


def ids(job: dict, count: int, rng: random.Random) -> list[int]:
  """Neither padding nor the end is among them."""
  return [rng.randrange(1, job["vocab"] - 1) for _ in range(count)]


def words(job: dict, count: int, rng: random.Random) -> str:
  return " ".join(map(str, ids(job, count, rng)))


class Step(transformers.TrainerCallback):
  """Makes a trainer take a step whenever one is asked for."""

  def __init__(self, line: protocol.Line, tokens):
    self.line, self.tokens, self.start = line, tokens, 0.0

  def on_step_begin(self, *_, **__):
    self.start = protocol.wait()

  def on_step_end(self, *_, **__):
    wait_for_device()
    seconds = time.perf_counter() - self.start
    self.line.answer(seconds=seconds, tokens=self.tokens(), software=SOFTWARE)


def settings(job: dict, rows: int) -> dict:
  """What all trainers are given; the rest is as TRL has it."""
  return dict(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=rows,
    max_steps=STEPS,
    learning_rate=3e-5,
    bf16=job["dtype"] == "bfloat16",  # The factors of LoRA stay in float32.
    gradient_checkpointing=job["remat"] != "none",
    use_cpu=device() == "cpu",
    report_to="none",
    save_strategy="no",
    logging_steps=STEPS,
    disable_tqdm=True,
  )


def sft(line: protocol.Line) -> None:
  job, rng = line.job, random.Random(0)
  prompt = job["time"] - job["answer"]
  mask = [0] * prompt + [1] * job["answer"]
  rows = [
    {"input_ids": ids(job, job["time"], rng), "completion_mask": mask}
    for _ in range(ROWS)
  ]
  config = trl.SFTConfig(
    **settings(job, job["rows"]), max_length=None, completion_only_loss=True
  )
  trainer = trl.SFTTrainer(
    model=model_of(job),
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer_of(job),
    peft_config=lora_of(job),
  )
  length = len(trainer.train_dataset[0]["input_ids"])
  trainer.add_callback(Step(line, lambda: job["rows"] * length))
  trainer.train()


def dpo(line: protocol.Line) -> None:
  job, rng = line.job, random.Random(0)
  prompt = job["time"] - job["answer"]
  answer = lambda: words(job, job["answer"] - 1, rng)  # TRL adds the end.
  rows = [
    {"prompt": words(job, prompt, rng) + " ", "chosen": answer(), "rejected": answer()}
    for _ in range(ROWS)
  ]
  config = trl.DPOConfig(
    **settings(job, job["rows"]), max_length=None, precompute_ref_log_probs=True
  )
  trainer = trl.DPOTrainer(
    model=model_of(job),
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer_of(job),
    peft_config=lora_of(job),
  )
  one = trainer.train_dataset[0]
  answers = len(one["chosen_ids"]) + len(one["rejected_ids"])
  tokens = job["rows"] * (2 * len(one["prompt_ids"]) + answers)
  trainer.add_callback(Step(line, lambda: tokens))
  trainer.train()


def grpo(line: protocol.Line) -> None:
  job, rng = line.job, random.Random(0)
  made = []  # Tokens of the last step's responses.

  def reward(completion_ids, **_):
    made.append(sum(map(len, completion_ids)))
    return [float(sum(row) % 97) for row in completion_ids]

  config = trl.GRPOConfig(
    **settings(job, job["prompts"] * job["group"]),
    num_generations=job["group"],
    max_completion_length=job["new"],
    generation_kwargs={"min_new_tokens": job["new"]},
    beta=0.04,
  )
  trainer = trl.GRPOTrainer(
    model=model_of(job),
    args=config,
    reward_funcs=reward,
    train_dataset=Dataset.from_list(
      [{"prompt": words(job, job["prompt"], rng)} for _ in range(ROWS)]
    ),
    processing_class=tokenizer_of(job),
    peft_config=lora_of(job),
  )
  trainer.add_callback(Step(line, lambda: made[-1]))
  trainer.train()


def sample(line: protocol.Line) -> None:
  """As GRPOTrainer samples: `generate` of the policy with its LoRA."""
  job, rng = line.job, random.Random(0)
  model = peft.get_peft_model(model_of(job), lora_of(job)).eval()
  rows = [ids(job, job["prompt"], rng) for _ in range(job["rows"])]
  prompts = torch.tensor(rows, device=device())
  length = dict(max_new_tokens=job["new"], min_new_tokens=job["new"])

  @torch.no_grad()
  def run() -> int:
    with torch.autocast(device(), torch.bfloat16, job["dtype"] == "bfloat16"):
      out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        **length,
      )
    wait_for_device()
    return out[:, job["prompt"] :].numel()

  protocol.serve(line, run, software=SOFTWARE)


def load(line: protocol.Line) -> None:
  """A LLaVA checkpoint's files onto the device."""

  def run() -> int:
    transformers.LlavaForConditionalGeneration.from_pretrained(
      line.job["folder"], dtype=torch.bfloat16, device_map=device()
    )
    wait_for_device()
    return 0

  protocol.serve(line, run, software=SOFTWARE)


JOBS = {"sft": sft, "dpo": dpo, "grpo": grpo, "sample": sample, "load": load}

if __name__ == "__main__":
  main()
