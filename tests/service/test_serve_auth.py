"""Keys, sessions, and who is a stranger."""

import os
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safer_ray.errors import UserError
from safer_ray.service.access import host_of, own_path
from safer_ray.service.auth import GRACE_S, SESSION_S, SETTLED_S, Keys, bearer_of, find_keys, is_own
from safer_ray.service.keys import Key, digest_of, new_key, parse_keys
from safer_ray.service.problems import Problem
from safer_ray.service.rate_limits import RateLimited, Rates, Window


def write(path, *names):
    """A keys file; the tokens by name."""
    made = {name: new_key(name) for name in names}
    path.write_text("# keys\n\n" + "\n".join(line for _, line in made.values()) + "\n", encoding="utf-8")
    return {name: token for name, (token, _) in made.items()}


def test_a_token_opens_and_its_hash_does_not(tmp_path):
    tokens = write(tmp_path / "keys", "a", "b")
    keys = Keys(tmp_path / "keys")
    assert [keys.name_of(tokens[name]) for name in ("a", "b")] == ["a", "b"]
    assert keys.name_of(digest_of(tokens["a"])) is None
    assert keys.name_of("") is None
    assert tokens["a"] not in (tmp_path / "keys").read_text(encoding="utf-8")


@given(st.text())
def test_no_other_text_opens(token):
    assert Keys(listed=(Key("a", digest_of(new_key("a")[0])),)).name_of(token) is None


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_key_taken_out_of_the_file_is_refused_from_then_on(tmp_path):
    tokens = write(tmp_path / "keys", "a", "b")
    keys = Keys(tmp_path / "keys")
    session = keys.open_session("a")
    lines = (tmp_path / "keys").read_text(encoding="utf-8").splitlines()
    (tmp_path / "new").write_text("\n".join(line for line in lines if not line.startswith("a:")), encoding="utf-8")
    os.replace(tmp_path / "new", tmp_path / "keys")
    assert (keys.name_of(tokens["a"]), keys.session_of(session)) == (None, None)
    assert keys.name_of(tokens["b"]) == "b"


@pytest.mark.parametrize("torn", ["", "a:sha256:", "half"])
def test_a_file_written_in_place_is_not_taken_half_written(tmp_path, caplog, torn):
    """Every valid key opens at any moment, and the new file counts when it stands still."""
    file, clock = tmp_path / "keys", Clock()
    tokens = write(file, "a", "b")
    keys = Keys(file, clock=clock)
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.splitlines()[2] + "\n" if torn == "half" else torn, encoding="utf-8")
    assert [keys.name_of(tokens[name]) for name in ("a", "b")] == ["a", "b"]
    clock.now += 0.2
    file.write_text(whole.replace("a:sha", "new:sha"), encoding="utf-8")
    assert [keys.name_of(tokens[name]) for name in ("a", "b")] == ["a", "b"]
    clock.now += SETTLED_S
    assert [keys.name_of(tokens[name]) for name in ("a", "b")] == ["new", "b"]
    assert not caplog.records


def test_what_was_written_long_ago_counts_at_the_first_request_that_sees_it(tmp_path, monkeypatch):
    file, clock = tmp_path / "keys", Clock()
    tokens = write(file, "a", "b")
    keys = Keys(file, clock=clock)
    write(file, "b")
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    assert keys.name_of(tokens["a"]) is None


@pytest.mark.parametrize("wrong", ["", "# none", "a token", b"\xff", None], ids=str)
def test_a_file_that_is_wrong_opens_nothing_after_a_while_and_both_are_logged(tmp_path, caplog, wrong):
    file, clock = tmp_path / "keys", Clock()
    tokens = write(file, "a")
    keys = Keys(file, clock=clock)
    session = keys.open_session("a")
    right = file.read_bytes()
    if wrong is None:
        file.unlink()
    else:
        file.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    for _ in range(8):
        assert (keys.name_of(tokens["a"]), keys.session_of(session)) == ("a", "a")
        clock.now += GRACE_S / 10
    clock.now += GRACE_S
    assert (keys.name_of(tokens["a"]), keys.session_of(session)) == (None, None)
    assert keys  # it stays closed
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("the keys before it hold for 10 s more")
    assert second == f"keys file {file} opens nothing until it is mended"
    assert "a token" not in first
    file.write_bytes(right)
    keys.name_of(tokens["a"])
    clock.now += SETTLED_S
    assert keys.name_of(tokens["a"]) == "a"


def test_many_keys_cost_a_request_no_more_than_one(tmp_path):
    lines = [f"k{number}:sha256:{number:064x}" for number in range(20_000)]
    (tmp_path / "keys").write_text("\n".join(lines), encoding="utf-8")
    keys = Keys(tmp_path / "keys")
    session = keys.open_session("k19999")
    began = time.process_time()
    for _ in range(200):
        assert keys.key_of("another") is None
        assert keys.session_of(session) == "k19999"
    assert (time.process_time() - began) / 200 < 1e-3


def test_a_file_that_is_replaced_counts_though_its_size_and_time_are_the_same(tmp_path):
    tokens = write(tmp_path / "keys", "a")
    keys = Keys(tmp_path / "keys")
    before = (tmp_path / "keys").stat()
    others = write(tmp_path / "new", "a")
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "new", tmp_path / "keys")
    after = (tmp_path / "keys").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert keys.name_of(tokens["a"]) is None
    assert keys.name_of(others["a"]) == "a"


def test_a_file_without_keys_and_a_name_twice_are_refused(tmp_path):
    (tmp_path / "keys").write_text("# none\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no key; write the line there that `safer-ray key NAME` prints"):
        Keys(tmp_path / "keys")
    line = new_key("a")[1]
    with pytest.raises(UserError, match="two keys are named 'a'"):
        parse_keys(f"{line}\n{line}", "keys")
    with pytest.raises(UserError, match=r"keys file .* cannot be read: No such file"):
        Keys(tmp_path / "absent")


def test_a_name_that_a_line_cannot_hold_is_refused():
    for name in ("", "a:b", "a b", "\u00e9", "-a", "x" * 65):
        with pytest.raises(UserError, match="wanted 1 to 64 letters, digits"):
            new_key(name)


def test_keys_come_from_a_file_or_the_environment(tmp_path):
    token, line = new_key("a")
    keys = find_keys(None, {"SAFER_RAY_KEYS": f"{line},{new_key('b')[1]}"})
    assert keys.name_of(token) == "a"
    assert not find_keys(None, {})
    write(tmp_path / "keys", "c")
    with pytest.raises(UserError, match="give one of them"):
        find_keys(tmp_path / "keys", {"SAFER_RAY_KEYS": line})


def test_a_session_ends_by_time_and_survives_no_change():
    keys = Keys(listed=(Key("a", "0" * 64), Key("b", "1" * 64)))
    value = keys.open_session("a", now=1000.0)
    assert keys.session_of(value, now=1000.0 + SESSION_S - 1) == "a"
    assert keys.session_of(value, now=1000.0 + SESSION_S) is None
    assert keys.session_of(Keys(listed=(Key("a", "2" * 64),)).open_session("a", now=1000.0), now=1000.0) is None
    assert keys.open_session("a", now=1000.0) != value


def test_every_process_with_the_same_key_accepts_a_session_whatever_other_keys_there_are(tmp_path):
    write(tmp_path / "keys", "a", "b")
    one, two = Keys(tmp_path / "keys"), Keys(tmp_path / "keys")
    session = one.open_session("a")
    assert two.session_of(session) == "a"
    line = next(line for line in (tmp_path / "keys").read_text(encoding="utf-8").splitlines() if line.startswith("a:"))
    assert find_keys(None, {"SAFER_RAY_KEYS": line}).session_of(session) == "a"
    write(tmp_path / "new", "a")  # another token of the same name
    os.replace(tmp_path / "new", tmp_path / "keys")
    assert two.session_of(session) is None


def test_a_secret_beside_the_keys_signs_what_their_hashes_alone_cannot(monkeypatch):
    listed = (Key("a", "0" * 64),)
    forged = Keys(listed=listed).open_session("a")  # by whoever reads the keys file
    monkeypatch.setenv("SAFER_RAY_SESSION_SECRET", "a shared secret")
    one, two = Keys(listed=listed), Keys(listed=listed)
    assert one.session_of(forged) is None
    assert two.session_of(one.open_session("a")) == "a"


# Expiry and limits


def test_a_key_and_its_sessions_end_when_it_expires():
    token, line = new_key("a", expires=2000.0)
    keys = Keys(listed=parse_keys(line, "keys"))
    session = keys.open_session("a", now=1000.0)
    assert (keys.name_of(token, now=1999.0), keys.session_of(session, now=1999.0)) == ("a", "a")
    assert (keys.name_of(token, now=2000.0), keys.session_of(session, now=2000.0)) == (None, None)


HEX = "0" * 64
LATER = "expires=2027-01-31T00:00:00Z"


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("", Key("a", HEX)),
        (f" {LATER}", Key("a", HEX, 1801353600.0)),
        (" requests=60 pairs=1000", Key("a", HEX, None, 60, 1000)),
        (f"  pairs=1\t{LATER}", Key("a", HEX, 1801353600.0, None, 1)),
    ],
)
def test_lines_tell_expiry_and_limits_and_those_without_hold_as_before(more, key):
    assert parse_keys(f"a:sha256:{HEX}{more}", "keys") == (key,)
    assert parse_keys(key.line, "keys") == (key,)
    assert parse_keys(f"# keys,{key.line}, ,b:sha256:{HEX}", "keys")[0] == key


@pytest.mark.parametrize(
    "more",
    [
        " request=60", " requests=0", " requests=-1", " requests=1e3", " requests=", " requests", " pairs=1 pairs=2",
        " pairs=1000000000", " pairs=\u0661", " expires=2027-01-31", " expires=2027-02-30T00:00:00Z", " expires=",
        " expires=2027-01-31T00:00:00+02:00", " Expires=2027-01-31T00:00:00Z", ":requests=60", " safer_x",
    ],
)  # fmt: skip
def test_a_line_that_says_anything_else_is_refused_and_not_shown(more):
    with pytest.raises(UserError, match=r"keys, line 1: wanted NAME:sha256:HEX, then any of expires=") as told:
        parse_keys(f"a:sha256:{HEX}{more}", "keys")
    assert "safer_x" not in str(told.value)


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 7)), max_size=40), st.integers(7, 12))
def test_no_minute_holds_more_than_the_limit_and_nobody_waits_without_need(asked, limit):
    window, now, taken = Window(), 0.0, []
    for pause, count in asked:
        now += pause
        wait = window.wait_for(count, limit, now)
        last = [took for at, took in taken if at > now - 60]
        assert (wait == 0) == (sum(last) + count <= limit)
        if wait:
            now += wait
            assert window.wait_for(count, limit, now + 1e-6) == 0
            now += 1e-6
        taken.append((now, count))
        window.take(count, now)
        assert sum(took for at, took in taken if at > now - 60) <= limit


def test_what_got_no_answer_does_not_count():
    rates, key = Rates(), Key("a", HEX, pairs=10)
    with pytest.raises(Problem), rates.pairs(key, 10, now=0.0):
        raise Problem(503, "gone")
    with rates.pairs(key, 10, now=1.0):
        pass
    with pytest.raises(RateLimited) as told, rates.pairs(key, 1, now=2.5):
        pass
    assert (told.value.status, told.value.headers["Retry-After"]) == (429, "59")
    with rates.pairs(key, 10, now=61.0):
        pass


def test_ingresses_share_a_keys_limits():
    rates, key = Rates(ingresses=3), Key("a", HEX, requests=7, pairs=100)
    for _ in range(3):
        rates.take_request(key, now=0.0)
    with pytest.raises(RateLimited, match="key a may send 7 requests a minute; try again in 60 s"):
        rates.take_request(key, now=0.0)
    rates.take_request(Key("b", "1" * 64, requests=7), now=0.0)
    with pytest.raises(Problem, match="413") as told, rates.pairs(key, 35, now=0.0):
        pass
    assert "send at most 34 in a request" in told.value.detail


@example(0.1, "\ud800")
@given(st.floats(0, 1, exclude_max=True), st.characters())
def test_a_session_that_was_changed_anywhere_is_nobodys(where, character):
    keys = Keys(listed=(Key("a", "0" * 64),))
    value = keys.open_session("a")
    place = int(where * len(value))
    changed = value[:place] + character + value[place + 1 :]
    assert keys.session_of(changed) == ("a" if changed == value else None)


@given(st.text())
def test_no_text_is_a_session_and_none_breaks_it(value):
    assert Keys(listed=(Key("a", "0" * 64),)).session_of(value) is None


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer x", "x"), ("bearer  x ", "x"), ("Basic x", None), ("Bearer ", None), ("x", None), (None, None)],
)
def test_only_bearer_tokens_are_read(header, token):
    assert bearer_of(header) == token


@pytest.mark.parametrize(
    ("headers", "own"),
    [
        ({}, True),  # no browser
        ({"sec-fetch-site": "same-origin", "origin": "null"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "same-site", "origin": "http://here:8000"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"origin": "http://here:8000"}, True),
        ({"origin": "http://here:8001"}, False),
        ({"origin": "null"}, False),
    ],
)
def test_a_form_is_the_page_s_own_by_what_browsers_tell(headers, own):
    assert is_own({"host": "here:8000", **headers}, "http") is own


def test_hosts_are_read_without_their_port():
    assert [host_of(h) for h in ("LOCALHOST:80", "[::1]:80", "[::1]", "::1", "a.b")] == [
        "localhost", "[::1]", "[::1]", "::1", "a.b",
    ]  # fmt: skip


@given(st.text())
def test_a_path_to_go_to_is_always_of_this_service(path):
    safe = own_path(path)
    assert safe.startswith("/")
    assert not safe.startswith(("//", "/\\"))
    assert "\n" not in safe


def test_the_command_shows_a_token_once_and_the_line_that_opens_to_it(safer, tmp_path):
    code, out, _ = safer("key", "team-a")
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    (tmp_path / "keys").write_text(shown["line"], encoding="utf-8")
    assert Keys(tmp_path / "keys").name_of(shown["token"]) == "team-a"
    code, _, err = safer("key", "team a")
    assert (code, "key name 'team a': wanted 1 to 64 letters" in err) == (2, True)


def test_the_command_makes_keys_that_expire_and_are_limited(safer):
    code, out, _ = safer("key", "team-a", "--days", "30", "--requests", "60", "--pairs", "1000")
    (key,) = parse_keys(dict(line.split(maxsplit=1) for line in out.splitlines())["line"], "keys")
    assert (code, key.requests, key.pairs) == (0, 60, 1000)
    assert key.expires == pytest.approx(time.time() + 30 * 86_400, abs=60)
    for option, told in (
        ("--days=0", "--days 0: wanted 0.001 (a minute and a half) or more"),
        ("--days=1e-9", "--days 1e-09: wanted 0.001"),
        ("--pairs=0", "--pairs 0: wanted 1 or more"),
        ("--pairs=1000000000", "key a: pairs 1000000000 a minute; wanted"),
    ):
        code, _, err = safer("key", "a", option)
        assert (code, told in err) == (2, True)
