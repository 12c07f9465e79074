/* Room that a thread keeps for the next call, for as long as it lives. */

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

enum { ALIGN = 64 };

static __thread float *shared_room, *own_room;
static __thread int64_t shared_size, own_size;
static pthread_key_t ending;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int begun;

static void at_the_end(void *any) {
    (void)any;
    free(shared_room), free(own_room);
    shared_room = own_room = NULL, shared_size = own_size = 0;
}

static void begin(void) { begun = !pthread_key_create(&ending, at_the_end); }

/* NULL if there is none. */
static float *room_for(float **kept, int64_t *size, int64_t needed) {
    if (*size < needed) {
        pthread_once(&once, begin);
        if (begun) pthread_setspecific(ending, &ending);
        free(*kept);
        *kept = NULL, *size = 0;
        if (posix_memalign((void **)kept, ALIGN, needed * sizeof(float))) *kept = NULL;
        else *size = needed;
    }
    return *kept;
}
