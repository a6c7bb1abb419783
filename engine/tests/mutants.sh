#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Break the engine in ways that somebody might, and see whether the tests notice:
# each line below is a sed script for engine.c, and the test that is to fail (or to
# hang, which its own alarm or watchdog, or a time limit, turns into a failure).
#
#	mutants.sh FOLDER [NAME]
set -u
cd "$(dirname "$0")"
mkdir -p "$1"
folder=$(realpath "$1")
only=${2:-}
total=0
noticed=0

# mutant NAME TEST SED-SCRIPT
mutant()
{
	local name=$1 test=$2 script=$3 status
	local copy=$folder/$name

	[ -z "$only" ] || [ "$only" = "$name" ] || return
	total=$((total + 1))
	rm -rf "$copy"
	mkdir -p "$copy"
	cp ../*.[ch] "$copy"
	sed -E -i "$script" "$copy/engine.c"
	if cmp -s ../engine.c "$copy/engine.c"; then
		echo "not ok $total - $name: does not apply any more"
		return
	fi
	if ! make --silent BUILD="$copy" ENGINE="$copy" WERROR= CFLAGS=-O2 \
		"$copy/$test" 2> "$copy/log"; then
		echo "not ok $total - $name: does not compile"
		return
	fi
	timeout --signal=KILL 90 "$copy/$test" \
		$([ "$test" = stress ] && echo --seconds 6) > "$copy/log" 2>&1
	status=$?
	if [ $status -eq 0 ]; then
		echo "not ok $total - $name: not noticed by $test"
	else
		noticed=$((noticed + 1))
		echo "ok $total - $name ($test: status $status)"
	fi
}

mutant counted_after_the_read stress '
	/atomic_store\(&page->begun, number \+ 1\);/d
	s/atomic_store\(&engine\.finished, number \+ 1\);/atomic_store(\&page->begun, number + 1); &/'
mutant finished_before_it_is_in_the_ring stress '
	s/^\t\tput_event\(&message\);/\t\t;/
	s/(atomic_store\(&engine\.finished, number \+ 1\);)/\1 if (length == sizeof(message)) put_event(\&message);/'
mutant nobody_waits_for_a_read_under_way stress '
	s/atomic_load\(&engine\.finished\) < begun;/false;/'
mutant nobody_looks_into_the_ring engine_test '
	s/if \(ring_is_empty\(\) \|\| pthread_mutex_trylock\(&engine\.lock\)\)/if (true)/'
mutant a_full_ring_loses_events engine_test '
	/== AIOUMMU_RING_SIZE\) \{/,/\}/ s/atomic_store\(&engine\.overrun, true\);//'
mutant the_thread_waits_for_the_lock engine_test '
	s/if \(!ring_is_empty\(\) && !pthread_mutex_trylock\(/if (!ring_is_empty() \&\& !pthread_mutex_lock(/'
mutant signals_are_not_blocked engine_test '
	s/sigfillset\(&all\);/sigemptyset(\&all);/'
mutant what_is_covered_is_trusted stress '
	s/^\t\t    !register_range\(mapping\.start, mapping\.end\)\) \{/\t\t    true) {/'
mutant one_page_is_registered stress '
	s/\.range\.len = end - start,/.range.len = 4096,/'
mutant the_fence_does_not_wait stress '
	s/is_busy = is_anything_under_way\(\);/is_busy = false;/'
mutant a_second_change_stays_exact engine_test '
	s/region->exact = false;/;/'
mutant last_comes_too_early engine_test '
	s/while \(count < room && \(region/while (count + 1 < room \&\& (region/'
mutant every_hit_counts engine_test '
	s/if \(notifier->last_change != engine\.change_number\)/if (true)/'
mutant nothing_is_spent engine_test '
	s/region->spent = true;/;/'
mutant a_report_outlives_its_region engine_test '
	s/^\tif \(region->pending\)$/\tif (false)/'
mutant closing_does_not_unregister engine_test '
	/while \(engine\.coverage\)/,/;/ s/release_cover\(/remove_cover(0, UINT64_MAX); (void)(/'
mutant what_was_forgotten_stays_registered engine_test '
	s/unregister_mappings\(engine\.forgotten_start, engine\.forgotten_end\);//'
mutant a_move_loses_its_target engine_test '
	s/add_cover\(change->target, end, false, true\);//'
mutant a_move_forgets_what_it_keeps engine_test '
	s/^(.*)remove_cover\(change->target, end\);/& remove_cover(change->start, change->end);/'
mutant a_copy_takes_itself_for_the_owner engine_test '
	s/return page && !atomic_load\(&page->owned\);/return false;/'
mutant files_of_others_are_closed engine_test '
	s/^\tif \(is_owned\(descriptor\)\)/\tif (descriptor->fd >= 0)/'
mutant poll_must_work engine_test '
	/^\tcase -1:/,/return true;/ s/return true;/for (;;) nanosleep(\&delay, NULL);/'

echo "# $noticed of $total noticed"
[ "$noticed" -eq "$total" ]
