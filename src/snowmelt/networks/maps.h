/* What the C files of this folder share: the numbers of a map, and for whom a function is compiled. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* Of bfloat16 the 16 bits are seen. */
#ifdef BF16
typedef uint16_t number;
#else
typedef float number;
#endif

/* Compiled apart, so that whoever only draws need not wait for gradients; the others are dropped. */
#define DROPPED static __attribute__((unused))
#ifdef GRADIENTS
#define FOR_ANSWERS DROPPED
#define FOR_GRADIENTS
#else
#define FOR_ANSWERS
#define FOR_GRADIENTS DROPPED
#endif
