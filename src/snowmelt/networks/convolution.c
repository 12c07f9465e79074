/* 3 x 3 convolutions of maps whose channels lie beside each other (NHWC), padded by one, and their gradients.

   `convolution.py` compiles this for float32 or for maps in bfloat16 (-DBF16), of which it sees the 16 bits. Weights
   and their gradients are float32 in both; numbers of channels are multiples of 16. Sums are float32, in an order that
   does not depend on how many pictures there are.

       int ready(void)

   is 1 where this process may use what was compiled;

       int convolve(x, w, bias, added, y, batch, height, width, channels, out, turned)

   makes y (batch, height, width, out) of x (batch, height, width, channels) and w (out, 3, 3, channels). `turned`: w is
   (channels, 3, 3, out) and turned by half a circle, as for the gradient by x. `bias` and `added`, which is like y, may
   be NULL. With -DGRADIENTS, instead of these,

       int weight_gradient(x, dy, dw, dbias, batch, height, width, channels, out)

   makes dw (out, 3, 3, channels) and dbias (out) of x and dy. It and `convolve` are not 0 if there was no memory. */

#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "maps.h"

/* Room that a thread keeps for the next call, for as long as it lives. */
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

#if defined(BF16) && defined(__AMX_BF16__)
#include "tiles.h"
#else
#include "winograd.h"
#endif
