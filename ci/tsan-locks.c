/* Lets ThreadSanitizer see the standard library's locks. The library is not instrumented: what its locks do inline, in
 * our crates, is seen, what they do out of line (when a lock is contended, or a Once runs) is not, and looks like no
 * lock at all. The linker sends calls of those functions through these wrappers (`--wrap`), which tell ThreadSanitizer
 * what the function did: the atomic that it used is the lock's first field, so the lock's address is the atomic's.
 *
 * `ci/check tsan` finds the symbols, whose names carry the library's version, and defines them as strings. All
 * arguments are register-sized; handing on four where a function takes fewer is harmless on the targets that are tried. */

typedef void *word;

void __tsan_acquire(void *atomic);
void __tsan_release(void *atomic);

#define WRAP(name, symbol, before)                                  \
    void real_##name(word, word, word, word) __asm__("__real_" symbol); \
    void wrap_##name(word, word, word, word) __asm__("__wrap_" symbol); \
    void wrap_##name(word lock, word a, word b, word c) {               \
        before;                                                         \
        real_##name(lock, a, b, c);                                     \
        __tsan_acquire(lock);                                           \
    }

/* The lock is held afterwards; unlocking is inline. */
WRAP(mutex, MUTEX_LOCK, )
WRAP(read, RWLOCK_READ, )
WRAP(write, RWLOCK_WRITE, )
/* Whoever finds it done sees what came before; what its closure writes is in tsan.supp. */
WRAP(once, ONCE_CALL, __tsan_release(lock))
/* The second argument is the mutex, which is given up and held again out of line. */
void real_wait(word, word, word, word) __asm__("__real_" CONDVAR_WAIT);
void wrap_wait(word, word, word, word) __asm__("__wrap_" CONDVAR_WAIT);
void wrap_wait(word condvar, word mutex, word b, word c) {
    __tsan_release(mutex);
    real_wait(condvar, mutex, b, c);
    __tsan_acquire(mutex);
}
