// In place of the system's: a failing assert ends the launch, and not the process. As there, each
// inclusion looks at NDEBUG anew.

#undef assert
#ifdef NDEBUG
#define assert(condition) ((void)0)
#else
#define assert(condition)                                                        \
  ((condition) ? (void)0                                                         \
               : ::nb_emulator::blame("assertion", {__FILE__, __LINE__}, "assert(%s) failed", \
                                      #condition))
#endif
