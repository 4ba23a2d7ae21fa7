"""What clients of a real server see: four scenarios, each against its baseline in the same run, by turns.

    python -m benchmarks.server.serving  # all of them, about ten minutes
    python -m benchmarks.server.serving --only prompt --targets 100 24 --rounds 5

Servers run in processes of their own with the bundled model; clients speak HTTP over loopback from this one, whose
strain is part of the figures. No figure of a scenario is printed when texts differ that should be the same. Writes
`serving.json`, a key for each scenario, where scenarios that were not asked for stay as they are:

    prompt      streams decode, and a long prompt arrives: the 99th percentile of the gaps between their tokens while it
                is computed, against that of the same streams just before; by scheduler.target_step_ms
    keys        the seconds to the first token of a tenant that sends one request at a time, while another one floods,
                against the same alone; and how evenly two that flood are served (Jain's index, 1 is evenly); by
                scheduler.max_running
    beginning   many chat requests share a system prompt: prompt tokens computed and seconds to the first token, against
                a server that keeps nothing (requests at the same time still share), and one that shares nothing either
    batching    in process: tokens/s of continuous against static batching of completions whose lengths have a heavy
                tail
"""
