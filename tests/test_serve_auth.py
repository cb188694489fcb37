"""Keys, sessions, and who is a stranger."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_ray.errors import UserError
from safer_ray.keys import Key, digest_of, new_key, parse_keys
from serve.access import host_of, own_path
from serve.auth import SESSION_S, Keys, bearer_of, find_keys, is_own


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


def test_a_key_taken_out_of_the_file_is_refused_from_then_on(tmp_path):
    tokens = write(tmp_path / "keys", "a", "b")
    keys = Keys(tmp_path / "keys")
    session = keys.open_session("a")
    lines = (tmp_path / "keys").read_text(encoding="utf-8").splitlines()
    (tmp_path / "keys").write_text("\n".join(line for line in lines if not line.startswith("a:")), encoding="utf-8")
    assert (keys.name_of(tokens["a"]), keys.session_of(session)) == (None, None)
    assert keys.name_of(tokens["b"]) == "b"
    (tmp_path / "keys").unlink()
    assert keys.name_of(tokens["b"]) is None
    assert keys  # it stays closed


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
    other = Keys(listed=keys.listed)
    assert other.session_of(value, now=1000.0) is None
    assert keys.session_of(other.open_session("a")) is None
    assert keys.open_session("a", now=1000.0) != value


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


def test_sessions_in_several_processes_are_signed_alike_where_a_secret_is_given(monkeypatch):
    monkeypatch.setenv("SAFER_RAY_SESSION_SECRET", "a shared secret")
    one, two = (Keys(listed=(Key("a", "0" * 64),)) for _ in range(2))
    assert two.session_of(one.open_session("a")) == "a"


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
