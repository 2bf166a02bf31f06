"""Faults of servers and numbers that the tests try; docs/reliability.md lists them."""

from tests.faults.catalog import Tried

SERVERS = "faults/test_servers.py::"
NUMBERS = "faults/test_numbers.py::"

SERVERS_AND_NUMBERS = (
  Tried(
    "a judge's server answers 429, 500, 502, 503 or HTML, stalls, resets, or sends "
    "half a reply, once",
    "the first failure of the run",
    "the query is sent again; results are equal",
    f"{SERVERS}test_a_fault_that_passes_costs_no_row",
  ),
  Tried(
    "a judge's server fails from a query on while it labels",
    "code 75: the share, the reason and the remedy",
    "the same command sends only the queries without a reply; results are equal",
    f"{SERVERS}test_a_server_that_fails_from_a_query_on_stops_the_run_and_costs_no_row",
  ),
  Tried(
    "fewer queries than endpoint.max_failed fail while a server labels",
    "their share, with the reasons",
    "their rows have no preference; the run continues",
    f"{SERVERS}test_a_server_that_fails_now_and_then_costs_only_its_rows",
  ),
  Tried(
    "a judge's server rejects all queries",
    "code 2: the status, the reason of the server and the settings to change",
    "the run resumes after the remedy; results are equal",
    f"{SERVERS}test_a_server_that_rejects_all_queries_ends_the_run_with_its_reason",
  ),
  Tried(
    "a judge's server cannot be reached",
    "code 75: the url",
    "the same command resumes",
    f"{SERVERS}test_a_server_that_cannot_be_reached_stops_the_run",
  ),
  Tried(
    "a row of endpoint.jsonl is changed or unreadable",
    "the file and the line",
    "only its query is sent again; results are equal",
    f"{SERVERS}test_a_damaged_reply_is_the_only_one_that_is_requested_again",
  ),
  Tried(
    "a weight of a base model is NaN or infinite",
    "code 2: the file and the tensor",
    "nothing is trained",
    f"{NUMBERS}test_a_tensor_that_is_not_finite_is_named",
  ),
  Tried(
    "a parameter of a saved step is NaN",
    "the step and the parameter",
    "the step is set aside; the stage trains again from the step before",
    f"{NUMBERS}test_a_saved_step_that_is_not_finite_is_set_aside",
  ),
  Tried(
    "rewards are NaN or infinite",
    "code 2: how many, of which term and records; some are counted as invalid",
    "saved steps are intact; the run resumes after the remedy",
    f"{NUMBERS}test_rewards_that_are_not_finite_end_the_run_at_the_good_step",
  ),
  Tried(
    "the scores of a reward model are NaN",
    "code 2: the term reward_model",
    "nothing is saved",
    f"{NUMBERS}test_a_reward_model_that_is_not_finite_ends_the_run",
  ),
  Tried(
    "a learning rate of 1000",
    "code 3 at the first step: the alarm jump",
    "the step is not saved",
    f"{NUMBERS}test_a_learning_rate_that_explodes_stops_before_the_step_is_saved",
  ),
  Tried(
    "an update overflows",
    "code 3 at its step: the alarm nan",
    "the update is skipped, and the step is not saved",
    "training/test_update.py::test_update_skips_a_change_that_is_not_finite",
  ),
  Tried(
    "all responses are empty, and all rewards are equal",
    "at the second step: the alarms empty and flat",
    "the run continues; a stage can stop for these alarms",
    f"{NUMBERS}test_equal_rewards_of_empty_responses_raise_alarms_at_the_second_step",
  ),
  Tried(
    "the rewards of each group of GRPO are equal",
    "at the second step: the alarm flat",
    "the run continues; a stage can stop for this alarm",
    f"{NUMBERS}test_equal_rewards_of_groups_raise_an_alarm_at_the_second_step",
  ),
)
