#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Run all tests, or the programs named: needs the module loaded, and what "make"
# built.  Prints TAP, each program a test, with its own TAP indented by "# ".
# The exit status is 1 if anything failed, else 0.
#
# UMMUNOTIFY_RULE_INSTALLED=1  the udev rule is in force: it is a failure if not
#                              everybody can open the device
# UMMUNOTIFY_TEST_LIMIT=N      kill a test after N seconds
# UMMUNOTIFY_HOLD=MODULE       ummunotify_hold.ko, made in hold/, to be loaded meanwhile

cd "$(dirname "$0")" || exit 1

all="abi_test behaviour_test wait_test lifetime_test limits_test operations_test
clients_2010_test features_test state_test uring_test trace_test foreign_test
torn_counter_test race_test stale_window_test
abi_test_32 behaviour_test_32 clients_2010_test_32 features_test_32 state_test_32
behaviour_test_featured lifetime_test_featured race_test_featured
stale_window_test_featured"

[ $# -gt 0 ] || set -- $all

counts=$(mktemp) || exit 1
trap 'rm -f "$counts"; [ -z "$UMMUNOTIFY_HOLD" ] || rmmod ummunotify_hold' EXIT
[ -z "$UMMUNOTIFY_HOLD" ] || insmod "$UMMUNOTIFY_HOLD" || exit 1

run() {
	case $1 in
	operations_test) ./operations_test ../operations.rst ;;
	# What was negotiated and is not used changes nothing.
	*_featured) UMMUNOTIFY_TEST_FEATURES=1 ./"${1%_featured}" ;;
	*) ./"$1" ;;
	esac
	echo "exit status $?"
}

# Pass on each line as it comes.  The counts are those of all programs together.
indent() {
	passed=0 failed=0 skipped=0 status=1 planned=-1 why=
	while IFS= read -r line; do
		case $line in
		"exit status "*) status=${line##* }; continue ;;
		1..*) planned=${line#1..} ;;
		"ok "*"# SKIP"*) skipped=$((skipped + 1)) ;;
		"ok "*) passed=$((passed + 1)) ;;
		"not ok "*) failed=$((failed + 1)) ;;
		esac
		echo "# $line"
	done
	if [ $((passed + failed + skipped)) -ne "$planned" ]; then
		echo "# it planned $planned tests"
		failed=$((failed + 1))
	elif [ "$status" -ne 0 ] && [ $failed -eq 0 ]; then
		failed=1
	fi
	echo "$passed $failed $skipped" >>"$counts"
	[ $failed -eq 0 ] && [ $passed -eq 0 ] && why=" # SKIP"
	[ $failed -eq 0 ] && echo "ok $2 $1$why" || echo "not ok $2 $1"
}

echo "TAP version 13"
echo "1..$#"
number=0
for program; do
	number=$((number + 1))
	echo "# $program"
	if [ -x "./${program%_featured}" ]; then
		run "$program" 2>&1 | indent "$program" $number
	elif [ "${program%_32}" != "$program" ]; then
		# It was built without a compiler for 32 bits.
		echo "ok $number $program # SKIP not built"
		echo "0 0 1" >>"$counts"
	else
		echo "not ok $number $program"
		echo "0 1 0" >>"$counts"
	fi
done

passed=0 failed=0 skipped=0
while read -r p f s; do
	passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done <"$counts"
echo "# Totals: pass:$passed fail:$failed skip:$skipped"
[ $failed -eq 0 ]
