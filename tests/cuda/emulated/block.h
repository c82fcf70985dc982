// A block of threads on a processor without a GPU: every thread is a fibre, which of them runs next
// is drawn at random, and so is when a copy arrives. It stops where no thread can go on.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace m3bind::cuda {

class Block {
 public:
  // `shared_bytes` include what aligns them to 1024.
  Block(uint64_t seed, int shared_bytes) : random_(seed), shared_(shared_bytes + kGuard) {}

  char* shared() {
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    return shared_.data() + (1024 - address % 1024) % 1024;
  }

  // `kernel` by so many threads.
  void run(int threads, const std::function<void()>& kernel) {
    std::memset(shared_.data(), 0x7f, shared_.size());  // NaN in 16 and 32 bits
    fibres_.clear();
    for (int i = 0; i < threads; ++i) fibres_.push_back(std::make_unique<Fibre>());
    body_ = kernel;
    alive_ = threads;
    for (auto& fibre : fibres_) {
      getcontext(&fibre->context);
      fibre->context.uc_stack.ss_sp = fibre->stack.data();
      fibre->context.uc_stack.ss_size = fibre->stack.size();
      fibre->context.uc_link = &home_;
      makecontext(&fibre->context, reinterpret_cast<void (*)()>(&Block::start), 0);
    }
    size_t behind = 0;  // a warp that waits while any other can go on
    while (alive_ > 0) {
      if (random_() % 64 == 0) behind = random_() % (fibres_.size() / kWarp);
      runnable_.clear();
      for (size_t i = 0; i < fibres_.size(); ++i)
        if (!fibres_[i]->done && (!fibres_[i]->waits || fibres_[i]->waits()))
          runnable_.push_back(i);
      if (runnable_.empty() && copies_.empty()) stop("no thread can go on");
      if (!copies_.empty() && (runnable_.empty() || random_() % 64 == 0)) copy_one();
      std::shuffle(runnable_.begin(), runnable_.end(), random_);
      for (size_t i : runnable_) {
        if (i / kWarp == behind && runnable_.size() > kWarp) continue;
        if (fibres_[i]->waits && !fibres_[i]->waits()) continue;
        fibres_[i]->waits = nullptr;
        thread_ = static_cast<int>(i);
        swapcontext(&home_, &fibres_[i]->context);
        if (!copies_.empty() && random_() % 256 == 0) copy_one();
      }
    }
    while (!copies_.empty()) copy_one();
    for (size_t i = shared_.size() - kGuard; i < shared_.size(); ++i)
      if (shared_[i] != 0x7f) stop("writes beyond its shared memory");
  }

  void wait(std::function<bool()> until) {
    if (until()) return;
    Fibre& own = *fibres_[thread_];
    own.waits = std::move(until);
    swapcontext(&own.context, &home_);
  }

  int thread() const { return thread_; }

  // All threads of a warp meet; the number of meetings so far of each warp and named barrier.
  void meet(int barrier, int threads, bool waits) {
    Meeting& meeting = meetings_[barrier];
    const int turn = meeting.turn;
    if (meeting.threads == 0) meeting.threads = threads;
    if (meeting.threads != threads) stop("a barrier of two sizes");
    if (++meeting.here == threads) {
      meeting.here = meeting.threads = 0;
      ++meeting.turn;
    } else if (waits) {
      wait([&meeting, turn] { return meeting.turn != turn; });
    }
  }

  static constexpr int kNamed = 16;  // barriers; the following are those of warps

  void meet_warp() { meet(kNamed + thread_ / kWarp, kWarp, true); }

  uint64_t& mail(int thread) { return fibres_[thread]->mail; }
  std::vector<std::function<void()>>& group() { return fibres_[thread_]->group; }
  std::vector<std::vector<std::function<void()>>>& groups() { return fibres_[thread_]->groups; }
  int& copies_out() { return fibres_[thread_]->copies_out; }
  // What this thread stored in shared memory and has not fenced since.
  std::vector<const char*>& unfenced() { return fibres_[thread_]->unfenced; }
  void must_be_fenced(const char* from, int bytes) {
    for (auto& fibre : fibres_)
      for (const char* at : fibre->unfenced)
        if (at >= from && at < from + bytes) stop("a copy of what is not fenced");
  }
  std::vector<std::function<void()>>& late() { return fibres_[thread_]->late; }

  void ask(std::function<void()> copy) { copies_.push_back(std::move(copy)); }

  [[noreturn]] void stop(const char* why) {
    std::fprintf(stderr, "emulated block: %s\n", why);
    std::abort();
  }

  std::mt19937_64 random_;
  int index = 0, count = 1;  // of the block

 private:
  static constexpr int kWarp = 32;
  static constexpr size_t kGuard = 256;

  struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 << 10);
    std::function<bool()> waits;
    bool done = false;
    uint64_t mail = 0;
    int copies_out = 0;
    std::vector<const char*> unfenced;
    std::vector<std::function<void()>> group, late;  // products; copies to memory
    std::vector<std::vector<std::function<void()>>> groups;
  };

  struct Meeting {
    int here = 0, threads = 0, turn = 0;
  };

  static void start();

  void copy_one() {
    const size_t i = random_() % copies_.size();
    std::function<void()> copy = std::move(copies_[i]);
    copies_.erase(copies_.begin() + static_cast<int64_t>(i));
    copy();
  }

  std::vector<char> shared_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<size_t> runnable_;
  std::vector<std::function<void()>> copies_;
  std::function<void()> body_;
  Meeting meetings_[kNamed + 64];
  ucontext_t home_;
  int thread_ = 0, alive_ = 0;
};

inline Block* block = nullptr;

inline void Block::start() {
  block->body_();
  Fibre& own = *block->fibres_[block->thread_];
  if (!own.group.empty() || !own.groups.empty()) block->stop("a thread ends before its wgmma");
  if (!own.late.empty()) block->stop("a thread ends before its copies");
  own.done = true;
  --block->alive_;
}

}  // namespace m3bind::cuda
