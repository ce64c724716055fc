// What tests ask of the emulated driver besides what the real one offers; found by dlsym in the
// library that was loaded.
#ifndef PAGETIDE_TESTS_WORKER_EMULATED_DRIVER_EMULATED_CUDA_DRIVER_H_
#define PAGETIDE_TESTS_WORKER_EMULATED_DRIVER_EMULATED_CUDA_DRIVER_H_

extern "C" {

// The call of that number from now on, of those that take something or ask about it, answers
// CUDA_ERROR_UNKNOWN and does nothing; 0: none.
void emulated_cuda_fail_at(int call);
// Was there such a call?
int emulated_cuda_has_failed();
// Things that this process has not given back: memory, addresses, mappings, contexts; of contexts
// that are current those of the calling thread.
int emulated_cuda_num_held();
}

#endif  // PAGETIDE_TESTS_WORKER_EMULATED_DRIVER_EMULATED_CUDA_DRIVER_H_
