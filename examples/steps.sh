# Shared by the scripts of the examples, which set $bin: prints each command before it runs, so that it can be copied.
step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
quoted() { # the words of a command, in quotes where a shell needs them
  local word
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./=:,-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "${word//\'/\'\\\'\'}"; fi
  done
}
run() { printf '$%s\n' "$(quoted "$bin/$1" "${@:2}")"; "$bin/$@"; }
