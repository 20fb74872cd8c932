"""Errors are one line, which tells no secret."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.errors import InputError, without_secrets

word = st.text("abcXYZ019-_.~%", min_size=4, max_size=12)


@given(*[word] * 5, st.booleans())
def test_what_a_url_must_not_tell_is_in_no_error(user, password, host, name, token, has_user):
    secrets = (f"{user}:{password}@" if has_user else "", f"?sig={token}&x={token}#{token}")
    url = f"https://{secrets[0]}{host}:8080/{name}.zarr{secrets[1]}"
    err = InputError(f"cannot be read (403, url='{url}')", where=url, fix="check the address")
    bare = f"https://{host}:8080/{name}.zarr"
    assert str(err) == f"{bare}: cannot be read (403, url='{bare}'); check the address"
    assert str(pickle.loads(pickle.dumps(err))) == str(err)


@given(st.text())
def test_what_is_no_url_stays_as_it_is(text):
    text = text.replace("://", ":")
    assert without_secrets(text) == text
