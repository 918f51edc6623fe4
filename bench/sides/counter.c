/* Lets a program under callgrind say which part of it is to be counted. Does nothing outside of valgrind. */
#include <valgrind/callgrind.h>

void counting_starts(void) {
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}

void counting_ends(void) {
    CALLGRIND_DUMP_STATS;
    CALLGRIND_STOP_INSTRUMENTATION;
}
