// A team of threads that runs one function together and meets at barriers: a forward is a few dozen
// short phases, and waking a thread through the kernel would take longer than many of them.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace taskbone {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Look at `ready` for some ten microseconds, then let others run in between.
template <class Ready>
inline void spin_until(Ready ready) {
    for (int turn = 0; !ready(); ++turn) {
        if (turn > 4000) {
            std::this_thread::yield();
        } else {
            pause();
        }
    }
}

class Team {
  public:
    explicit Team(int size) : size_(size), next_(size) {
        for (int member = 1; member < size; ++member)
            threads_.emplace_back([this, member] { serve(member); });
    }

    ~Team() {
        stopping_ = true;
        wake();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Run `work(member)` on every member, the caller being member 0; return when all have.
    void run(const std::function<void(int)>& work) {
        work_ = &work;
        working_.store(size_ - 1, std::memory_order_relaxed);
        wake();
        work(0);
        for (int turn = 0; turn < 2000 && working_.load(std::memory_order_acquire); ++turn) pause();
        while (const int others = working_.load(std::memory_order_acquire))
            working_.wait(others, std::memory_order_acquire);
    }

    void barrier() {
        const unsigned round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            for (auto& next : next_) next.value.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
        }
    }

    // Share `count` pieces of work and wait for all. Every member begins with a share of its own,
    // the same in every phase, so that it finds its rows in its cache; then it helps the others.
    template <class Work>
    void each(int member, int count, Work work) {
        for (int turn = 0; turn < size_; ++turn) {
            const int owner = (member + turn) % size_;
            const int first = int(int64_t(count) * owner / size_);
            const int end = int(int64_t(count) * (owner + 1) / size_);
            for (;;) {
                const int piece = first + next_[owner].value.fetch_add(1, std::memory_order_relaxed);
                if (piece >= end) break;
                work(piece);
            }
        }
        barrier();
    }

  private:
    struct alignas(64) Counter {
        std::atomic<int> value{0};
    };

    void wake() {
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }

    void serve(int member) {
        unsigned seen = 0;
        for (;;) {
            for (int turn = 0; turn < 2000 && epoch_.load(std::memory_order_acquire) == seen; ++turn) pause();
            epoch_.wait(seen, std::memory_order_acquire);
            seen = epoch_.load(std::memory_order_acquire);
            if (stopping_) return;
            (*work_)(member);
            if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) working_.notify_one();
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    std::vector<Counter> next_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<unsigned> epoch_{0};
    alignas(64) std::atomic<int> working_{0};  // members besides the caller that have not ended
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace taskbone
