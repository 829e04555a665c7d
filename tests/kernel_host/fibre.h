// A fibre: one GPU thread's stack, and where it was left. x86-64 has a switch of its own (a few ns); elsewhere
// ucontext.
#pragma once
#if defined(__APPLE__) && !defined(_XOPEN_SOURCE)
#error "compile with -D_XOPEN_SOURCE=600 -D_DARWIN_C_SOURCE: macOS hides ucontext otherwise"
#endif
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) && !defined(KERNEL_HOST_UCONTEXT)
#define KERNEL_HOST_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace kernel_host {

class Fibre {
 public:
  // `entry` runs at the first switch and never returns.
  void start(char* stack, size_t bytes, void (*entry)());
  static void switch_from_to(Fibre& from, Fibre& to);

 private:
#ifdef KERNEL_HOST_OWN_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

#ifdef KERNEL_HOST_OWN_SWITCH

// Saves the registers that a call preserves, System V ABI.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save: rdi*/, void* /*to: rsi*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "retq\n");
}

inline void Fibre::start(char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSaved = 6;
  void** top = reinterpret_cast<void**>(stack + bytes) - 3;  // entry finds rsp = 8 mod 16, as after a call
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(entry);
  memset(top - 1 - kSaved, 0, kSaved * sizeof(void*));
  stack_pointer_ = top - 1 - kSaved;
}

inline void Fibre::switch_from_to(Fibre& from, Fibre& to) {
  switch_stacks(&from.stack_pointer_, to.stack_pointer_);
}

#else

inline void Fibre::start(char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

inline void Fibre::switch_from_to(Fibre& from, Fibre& to) {
  swapcontext(&from.context_, &to.context_);
}

#endif

}  // namespace kernel_host
