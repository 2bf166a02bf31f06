"""Faults of servers and numbers that the tests try; docs/reliability.md lists them."""

from tests.faults.catalog import Tried

SERVERS = "faults/test_servers.py::"

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
)
