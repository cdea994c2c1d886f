from mixer_jax.benchmark.timing import Spread, Timing, take_turns


def test_spread_is_median_least_and_most():
    assert Spread.of([3, 1, 10, 2, 4]) == Spread(3, 1, 10, 5)


def test_ratios_compare_what_was_measured_in_the_same_turn():
    # In the second turn the machine was three times as slow for both.
    ours, theirs = Timing((1, 3, 1), ()), Timing((2, 6, 2), ())
    assert theirs.over(ours) == Spread(2, 2, 2, 3)
    assert ours.per_sec(6) == Spread(6, 2, 6, 3)


def test_calls_take_turns_and_every_result_is_waited_for():
    made, waited = [], []

    def call(name):
        made.append(name)
        return len(made)

    calls = {name: lambda name=name: call(name) for name in "ab"}
    found = take_turns(calls, waited.append, repeats=3, least_secs=0)
    assert made == [*"aabb", *"ababab"]  # two calls of each warm it up
    assert waited == [*range(1, len(made) + 1)]
    assert {len(x.secs) for x in found.values()} == {3}
    assert all(secs > 0 for x in found.values() for secs in x.secs)


def test_short_calls_are_repeated_with_at_most_two_on_the_way():
    on_the_way, most = 0, 0

    def call():
        nonlocal on_the_way, most
        on_the_way += 1
        most = max(most, on_the_way)

    def wait(result):
        nonlocal on_the_way
        on_the_way -= 1

    (timing,) = take_turns({"": call}, wait, 5, least_secs=0.01).values()
    assert on_the_way == 0
    assert most == 2
    assert timing.spread.median < 0.01  # seconds of one call, not of a measurement
