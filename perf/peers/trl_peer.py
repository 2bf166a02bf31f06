"""Runs TRL's trainers and transformers' `generate` as a peer of perf/main.py.

perf/bench.py starts this script in an environment with trl, peft and PyTorch. The model
is a Llama of random weights, with PEFT's LoRA on all matrices of its layers. A step is
that of the trainer's loop, from on_step_begin to on_step_end.
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
STEPS = 10**6  # Training steps: more than any benchmark requests.
ROWS = 64  # Rows of the data.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
  """Runs the requested job."""
  connection = protocol.connect()
  torch.set_num_threads(connection.job["threads"])
  torch.manual_seed(0)
  JOBS[connection.job["what"]](connection)


def get_device() -> str:
  """Returns the device's name in PyTorch."""
  return "cuda" if torch.cuda.is_available() else "cpu"


def wait_for_device() -> None:
  """Waits until a GPU has finished its work."""
  if get_device() == "cuda":
    torch.cuda.synchronize()


def make_model(job: dict) -> transformers.PreTrainedModel:
  """Creates a model of random weights, without LoRA."""
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
  with torch.device(get_device()):
    return transformers.AutoModelForCausalLM.from_config(
      config, dtype=DTYPES[job["dtype"]], attn_implementation="sdpa"
    )


def make_lora_config(job: dict) -> peft.LoraConfig:
  """Returns the LoRA config of a job."""
  return peft.LoraConfig(
    r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear"
  )


def make_tokenizer(job: dict) -> transformers.PreTrainedTokenizerFast:
  """Creates a tokenizer of one token per word: "7 12 9" is the ids 7, 12 and 9."""
  words = {str(i): i for i in range(1, job["vocab"] - 1)}
  words |= {"<pad>": 0, "<end>": job["vocab"] - 1}
  tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
  )


def sample_ids(job: dict, count: int, rng: random.Random) -> list[int]:
  """Samples token ids, without padding and EOS."""
  return [rng.randrange(1, job["vocab"] - 1) for _ in range(count)]


def sample_words(job: dict, count: int, rng: random.Random) -> str:
  """Samples a text of random words."""
  return " ".join(map(str, sample_ids(job, count, rng)))


class Step(transformers.TrainerCallback):
  """A callback that lets a trainer take a step at each request."""

  def __init__(self, connection: protocol.Connection, tokens):
    self.connection, self.tokens, self.start = connection, tokens, 0.0

  def on_step_begin(self, *_, **__):
    """Waits for a request and starts the clock."""
    self.start = protocol.wait()

  def on_step_end(self, *_, **__):
    """Replies with the seconds of the step."""
    wait_for_device()
    seconds = time.perf_counter() - self.start
    self.connection.reply(seconds=seconds, tokens=self.tokens(), software=SOFTWARE)


def make_training_args(job: dict, rows: int) -> dict:
  """Returns the settings that all trainers share; others have TRL's defaults."""
  return dict(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=rows,
    max_steps=STEPS,
    learning_rate=3e-5,
    bf16=job["dtype"] == "bfloat16",  # LoRA factors stay in float32.
    gradient_checkpointing=job["remat"] != "none",
    use_cpu=get_device() == "cpu",
    report_to="none",
    save_strategy="no",
    logging_steps=STEPS,
    disable_tqdm=True,
  )


def run_sft(connection: protocol.Connection) -> None:
  """Runs steps of SFTTrainer."""
  job, rng = connection.job, random.Random(0)
  prompt = job["time"] - job["answer"]
  mask = [0] * prompt + [1] * job["answer"]
  rows = [
    {"input_ids": sample_ids(job, job["time"], rng), "completion_mask": mask}
    for _ in range(ROWS)
  ]
  config = trl.SFTConfig(
    **make_training_args(job, job["rows"]), max_length=None, completion_only_loss=True
  )
  trainer = trl.SFTTrainer(
    model=make_model(job),
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=make_tokenizer(job),
    peft_config=make_lora_config(job),
  )
  length = len(trainer.train_dataset[0]["input_ids"])
  trainer.add_callback(Step(connection, lambda: job["rows"] * length))
  trainer.train()


def run_dpo(connection: protocol.Connection) -> None:
  """Runs steps of DPOTrainer, with precomputed reference log-probabilities."""
  job, rng = connection.job, random.Random(0)
  prompt = job["time"] - job["answer"]
  answer = lambda: sample_words(job, job["answer"] - 1, rng)  # TRL adds the EOS.
  text = lambda: sample_words(job, prompt, rng) + " "
  rows = [
    {"prompt": text(), "chosen": answer(), "rejected": answer()} for _ in range(ROWS)
  ]
  args = make_training_args(job, job["rows"])
  config = trl.DPOConfig(**args, max_length=None, precompute_ref_log_probs=True)
  trainer = trl.DPOTrainer(
    model=make_model(job),
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=make_tokenizer(job),
    peft_config=make_lora_config(job),
  )
  one = trainer.train_dataset[0]
  answers = len(one["chosen_ids"]) + len(one["rejected_ids"])
  tokens = job["rows"] * (2 * len(one["prompt_ids"]) + answers)
  trainer.add_callback(Step(connection, lambda: tokens))
  trainer.train()


def run_grpo(connection: protocol.Connection) -> None:
  """Runs steps of GRPOTrainer."""
  job, rng = connection.job, random.Random(0)
  token_counts = []  # Tokens of each step's responses.

  def reward(completion_ids, **_):
    token_counts.append(sum(map(len, completion_ids)))
    return [float(sum(row) % 97) for row in completion_ids]

  config = trl.GRPOConfig(
    **make_training_args(job, job["prompts"] * job["group"]),
    num_generations=job["group"],
    max_completion_length=job["new"],
    generation_kwargs={"min_new_tokens": job["new"]},
    beta=0.04,
  )
  trainer = trl.GRPOTrainer(
    model=make_model(job),
    args=config,
    reward_funcs=reward,
    train_dataset=Dataset.from_list(
      [{"prompt": sample_words(job, job["prompt"], rng)} for _ in range(ROWS)]
    ),
    processing_class=make_tokenizer(job),
    peft_config=make_lora_config(job),
  )
  trainer.add_callback(Step(connection, lambda: token_counts[-1]))
  trainer.train()


def run_sampling(connection: protocol.Connection) -> None:
  """Runs the policy's `generate` with LoRA, as GRPOTrainer does."""
  job, rng = connection.job, random.Random(0)
  model = peft.get_peft_model(make_model(job), make_lora_config(job)).eval()
  rows = [sample_ids(job, job["prompt"], rng) for _ in range(job["rows"])]
  prompts = torch.tensor(rows, device=get_device())
  length = dict(max_new_tokens=job["new"], min_new_tokens=job["new"])

  @torch.no_grad()
  def run() -> int:
    with torch.autocast(get_device(), torch.bfloat16, job["dtype"] == "bfloat16"):
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

  protocol.serve(connection, run, software=SOFTWARE)


def run_loading(connection: protocol.Connection) -> None:
  """Loads a LLaVA checkpoint's files onto the device."""

  def run() -> int:
    transformers.LlavaForConditionalGeneration.from_pretrained(
      connection.job["folder"], dtype=torch.bfloat16, device_map=get_device()
    )
    wait_for_device()
    return 0

  protocol.serve(connection, run, software=SOFTWARE)


JOBS = {
  "sft": run_sft,
  "dpo": run_dpo,
  "grpo": run_grpo,
  "sample": run_sampling,
  "load": run_loading,
}

if __name__ == "__main__":
  main()
