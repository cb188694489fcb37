#!/bin/sh
# HAProxy (the binary SAFER_RAY_HAPROXY) as Ray Serve starts it by RAY_SERVE_HAPROXY_BINARY_PATH, less open than Ray's
# settings leave it: its statistics are on loopback, its admin socket is its user's, a request's headers have to come
# within 20 s, and its own errors are problem details (RFC 9457).
set -eu
settings=
previous=
for argument in "$@"; do
  if [ "$previous" = -f ]; then settings=$argument; fi
  previous=$argument
done

# answer STATUS TITLE DETAIL: what HAProxy says in that case, as a line of its settings
answer() {
  printf "    http-error status %s content-type application/problem+json string '%s' hdr Retry-After 2 hdr Cache-Control no-store\\n" "$1" \
    "{\"type\":\"about:blank\",\"title\":\"$2\",\"status\":$1,\"detail\":\"$3\"}"
}

if [ -n "$settings" ]; then
  answers=$(mktemp "$settings.XXXXXX")
  {
    answer 500 "Internal Server Error" "the proxy failed; try again"
    answer 502 "Bad Gateway" "the process that was to answer is gone; try again"
    answer 503 "Service Unavailable" "no process answers here for now; try again"
    answer 504 "Gateway Timeout" "no answer in time; send fewer pairs or try again"
  } > "$answers"
  sed -i \
    -e '/^frontend prometheus/,/^ *mode/ s/bind :/bind 127.0.0.1:/' \
    -e '/^listen stats/,$ s/bind \*:/bind 127.0.0.1:/' \
    -e '/^ *stats socket/ s/mode 666/mode 600/' \
    -e 's/^\( *\)timeout connect .*/&\n\1timeout http-request 20s/' \
    -e "/^ *errorfile 502/r $answers" \
    -e '/^ *errorfile/d' \
    "$settings"
  rm "$answers"
  # Another Ray may write other settings, of which these lines would leave something open without a word.
  wanted() { grep -Eq "$1" "$settings" || refuse "has no line $1"; }
  unwanted() { if grep -Eq "$1" "$settings"; then refuse "still has a line $1"; fi; }
  refuse() {
    echo "haproxy.sh: $settings $1; Ray writes it otherwise than 2.60 does: install the Ray of pyproject.toml" >&2
    exit 1
  }
  wanted '^ *stats socket .* mode 600 '
  wanted '^ *timeout http-request 20s$'
  wanted '^ *http-error status 50[234] '
  # The service itself listens where its user said, which may be everywhere.
  if sed -e '/^frontend http_frontend/,/^ *bind/ s/^ *bind/    said/' "$settings" | grep -Eq '^ *bind +(:|[^ ]*\*)'; then
    refuse "still has a line that binds everywhere"
  fi
  unwanted 'mode 666'
  unwanted '^ *errorfile'
fi
if [ -n "${SAFER_RAY_PYTHON:-}" ]; then  # it ends with the process that started it, also where that one is killed
  exec "$SAFER_RAY_PYTHON" -ISc 'import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])' "$PPID" "$SAFER_RAY_HAPROXY" "$@"
fi
exec "$SAFER_RAY_HAPROXY" "$@"
